"""The language model: embedding, blocks, norm, head; the contract one level up."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyform.block import BlockState
from manyform.channels.mlp import ACTIVATIONS
from manyform.config import ModelConfig
from manyform.contract import Cost, SequenceMixer, losses
from manyform.errors import ManyformError
from manyform.exits import Exits
from manyform.init import linear
from manyform.linear import Linear
from manyform.norms import norm, stream_norm
from manyform.ops.cross_entropy import linear_cross_entropy
from manyform.ops.operation import trace
from manyform.positions import AxialPositions, document_positions, sinusoidal
from manyform.prefix import Prefix, require_prefix
from manyform.stack import Stack, ends_in_norm


class ModelState(NamedTuple):
    """position: (batch,) int64, tokens since the row's document began; layers: one state each."""

    position: Tensor
    layers: tuple[BlockState, ...]


@dataclass(frozen=True)
class ModelCost:
    """What a model costs: see `Model.cost`."""

    params: int
    active_params: int
    flops: int
    length: int
    state_bytes: int
    paths: dict[str, str] = field(default_factory=dict)

    @property
    def flops_per_token(self) -> float:
        """Forward operations per token, averaged over `length`."""
        return self.flops / self.length

    @property
    def training_flops_per_token(self) -> float:
        """Three times forward: the backward pass computes two products for each of its one."""
        return 3 * self.flops_per_token


class Model(nn.Module):
    """`logits, state = model(tokens, state, reset=...)` for any pattern of blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d = config.d_model
        self.embedding = nn.Embedding(config.vocab_size, d)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        if config.embedding_norm:
            self.embedding_norm = norm(config.norm, d, config.norm_eps)
        self.positions: nn.Embedding | AxialPositions
        if config.position == "learned":
            self.positions = nn.Embedding(config.max_length, d)
            nn.init.normal_(self.positions.weight, std=0.02)
        elif config.position == "axial":
            assert config.axial_shape is not None
            assert config.axial_dims is not None
            self.positions = AxialPositions(config.axial_shape, config.axial_dims)
        if config.segments:
            self.segments = nn.Embedding(config.segments, d)
            nn.init.normal_(self.segments.weight, std=0.02)
        if config.embedding_map:
            self.embedding_map = linear(d, d, bias=True)
        self.blocks = Stack(config.layers, d, residual=config.residual,
                            make_norm=lambda: norm(config.norm, d, config.norm_eps))
        self.prefix: Prefix | None = None
        if config.prefix_tokens:
            require_prefix(self.blocks)
            self.prefix = Prefix(config.prefix_tokens, d, config.embedding_std)
        final = config.final_norm and not ends_in_norm(config.residual)
        self.final_norm = norm(config.norm if final else "none", config.width, config.norm_eps)
        self.head = Linear(config.width, config.vocab_size, bias=config.head_bias)
        nn.init.normal_(self.head.weight, std=0.02)
        if config.head_bias:
            nn.init.zeros_(self.head.bias)
        if config.head_map is not None:
            self.head_map = linear(d, d, bias=True)
            self.head_norm = norm(config.norm, d, config.norm_eps)
        if config.tie:
            self.head.weight = self.embedding.weight

    @property
    def causal(self) -> bool:
        """False if any mixer looks ahead; such a model cannot stream."""
        return all(mixer.causal for mixer in self.mixers)

    @property
    def mixers(self) -> list[SequenceMixer]:
        """The sequence mixers, layer by layer."""
        return [block.mixer for block in self.blocks.layers]

    def features(self, tokens: Tensor, state: ModelState | None = None, *,
                 reset: Tensor | None = None) -> tuple[Tensor, ModelState | None]:
        """What the head reads. tokens: (batch, length) int64 -> (batch, length, d_model; twice that
        for residual="reversible")."""
        threshold = None if self.training else self.config.exit_threshold
        exits = None if threshold is None else self._exits(threshold)
        return self._run(tokens, state, reset, {}, exits)

    def _run(self, tokens: Tensor, state: ModelState | None, reset: Tensor | None,
             shared: dict[str, Any], exits: Exits | None) -> tuple[Tensor, ModelState | None]:
        """What the head reads, and the state; what layers tell each other is left in `shared`."""
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ManyformError("tokens must be (batch, length) int64, not "
                                f"{tuple(tokens.shape)} {tokens.dtype}")
        if state is not None and not self.causal:
            raise ManyformError(f"{self.config.name or 'this model'} looks ahead and cannot "
                                "continue from a state; give it the whole sequence in one call")
        batch, length = tokens.shape
        before = (state.position if state is not None
                  else torch.zeros(batch, dtype=torch.int64, device=tokens.device))
        positions = document_positions(before, length, reset)
        x = self.embedding(tokens)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        if self.config.position == "sinusoidal":
            x = x * math.sqrt(self.config.d_model)  # Vaswani 2017, section 3.4
        if self.config.position != "none":
            x = x + self._position_embedding(positions).to(x.dtype)
        if self.config.segments:
            x = x + self.segments.weight[0].to(x.dtype)
        if self.config.embedding_norm:
            x = stream_norm(self.embedding_norm, x)
        if self.config.embedding_map:
            x = self.embedding_map(x).to(x.dtype)
        layers = None if state is None else state.layers
        if self.prefix is not None:
            h, after = self.prefix(self.blocks, x, positions == 0, layers, shared=shared,
                                   final_norm=self.final_norm)
        else:
            shared["tokens"] = tokens
            h, after = self.blocks(x, layers, reset=reset, shared=shared,
                                   final_norm=self.final_norm, exits=exits)
        last = positions[:, -1] + 1 if length else before
        return h, ModelState(last, after) if self.causal else None

    def _exits(self, threshold: float | None) -> Exits:
        return Exits(self.config.exits, self.final_norm,
                     lambda h: self.logits(h).float().softmax(-1).amax(-1), threshold)

    def forward(self, tokens: Tensor, state: ModelState | None = None, *,
                reset: Tensor | None = None) -> tuple[Tensor, ModelState | None]:
        """tokens: (batch, length) int64 -> logits (batch, length, vocab_size), and the state
        (None for a model that looks ahead).

        state: what an earlier call returned, or None at the start. reset: (batch, length) bool,
        true where a new document begins. Raises ManyformError for tokens of another shape, and
        past the end of a learned position table.
        """
        h, state = self.features(tokens, state, reset=reset)
        return self.logits(h), state

    def logits(self, features: Tensor) -> Tensor:
        """What the head reads, (..., d_model), to logits (..., vocab_size)."""
        config = self.config
        if config.head_map is not None:
            features = self.head_norm(ACTIVATIONS[config.head_map](self.head_map(features)))
        logits = self.head(features)
        if config.logit_scale != 1:
            logits = logits * config.logit_scale
        if config.logit_cap is not None:
            logits = config.logit_cap * torch.tanh(logits / config.logit_cap)
        return logits

    def loss(self, tokens: Tensor, targets: Tensor, state: ModelState | None = None, *,
             reset: Tensor | None = None, ignore_index: int = -100,
             ) -> tuple[Tensor, ModelState | None]:
        """Mean cross-entropy in nats over targets that are not `ignore_index`, and the state.

        In training mode the terms that layers add for themselves (`contract.add_loss`: a ponder
        cost, a ratio of chunks) are part of it, and the losses at the model's exits; in evaluation
        mode it is the cross-entropy alone.
        The logits of all positions are never held at once where the device has a fused form.
        """
        if not self.training:
            h, state = self.features(tokens, state, reset=reset)
            return self._cross_entropy(h, targets, ignore_index), state
        shared: dict[str, Any] = {}
        exits = self._exits(None) if self.config.exits else None
        h, state = self._run(tokens, state, reset, shared, exits)
        loss = self._cross_entropy(h, targets, ignore_index)
        if exits is not None:
            depths = [*self.config.exits, self.config.n_layers]
            early = [self._cross_entropy(h, targets, ignore_index) for h in exits.collected]
            weights = torch.tensor(depths, device=loss.device) / sum(depths)
            loss = (weights * torch.stack([*early, loss])).sum()
        return loss + sum(losses(shared).values()), state

    def _cross_entropy(self, h: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        rows, wanted = h.reshape(-1, h.shape[-1]), targets.reshape(-1)
        if self._plain_head:
            total = linear_cross_entropy(rows, self.head.weight, wanted, ignore_index)
        else:
            total = F.cross_entropy(self.logits(rows).float(), wanted, ignore_index=ignore_index,
                                    reduction="sum")
        return total / (targets != ignore_index).sum().clamp(min=1)

    @property
    def _plain_head(self) -> bool:
        """Logits are a matrix product with the head's weights and nothing else."""
        c = self.config
        return (not c.head_bias and c.logit_scale == 1 and c.logit_cap is None
                and c.head_map is None)

    def initial_state(self, batch_size: int) -> ModelState | None:
        """The state before the first token (None for a model that looks ahead)."""
        if not self.causal:
            return None
        device = self.embedding.weight.device
        return ModelState(torch.zeros(batch_size, dtype=torch.int64, device=device),
                          self.blocks.initial_state(batch_size, device=device))

    def num_params(self) -> int:
        """Parameters, tied ones once."""
        return sum(p.numel() for p in self.parameters())

    def cost(self, length: int = 1024) -> ModelCost:
        """Parameters, forward operations for `length` tokens from the start of one sequence,
        state bytes after them, and the path that each operation takes on this model's device."""
        if length < 1:
            raise ManyformError(f"length must be at least 1, not {length}")
        cost = self.blocks.cost(length + self.config.prefix_tokens) + self._outside(length)
        params = self.num_params()
        return ModelCost(params, params, cost.flops, length, cost.state_bytes, self.paths(length))

    @property
    def exact_cost(self) -> bool:
        """False if the work depends on the data: that of a part, or where tokens leave."""
        return self.config.exit_threshold is None and all(
            part.exact_cost for block in self.blocks.layers
            for part in (block.mixer, block.channel) if part is not None)

    @property
    def discrete(self) -> bool:
        """Whether the data choose in any part, or where tokens leave (`Mixer.discrete`)."""
        return self.config.exit_threshold is not None or any(
            part.discrete for block in self.blocks.layers
            for part in (block.mixer, block.channel) if part is not None)

    def cost_limit(self, length: int) -> Cost:
        """The most that `length` tokens of one sequence can cost."""
        return (self.blocks.cost_limit(length + self.config.prefix_tokens)
                + self._outside(length))

    def _outside(self, length: int) -> Cost:
        """The heads, at every exit that asks them, the maps at both ends, and the position."""
        c = self.config
        heads = 1 if c.exit_threshold is None else 1 + len(c.exits)
        head = c.width * (c.vocab_size + (c.d_model if c.head_map is not None else 0))
        entrance = c.d_model**2 if c.embedding_map else 0
        return Cost(2 * length * (heads * head + entrance), 8 if self.causal else 0)

    @torch.no_grad()
    def paths(self, length: int = 128) -> dict[str, str]:
        """Which form each operation takes for sequences of (up to 128 of) `length` tokens."""
        device = self.embedding.weight.device
        if device.type == "meta":
            return {}
        tokens = torch.zeros(1, min(length, 128), dtype=torch.int64, device=device)
        with trace() as seen:
            self(tokens)
        return {op: path for op, path in sorted(seen)}

    def generate(self, prompt: Tensor, max_new_tokens: int, **options: Any) -> Any:
        """Sample a continuation; see `manyform.generation.generate`."""
        from manyform.generation import generate
        return generate(self, prompt, max_new_tokens, **options)

    def save(self, path: str | Path) -> None:
        """Write `config.json` and `model.safetensors` into the folder `path`; tied weights once."""
        from safetensors.torch import save_file
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")
        weights = {k: v.detach().contiguous() for k, v in self.state_dict().items()
                   if not (self.config.tie and k == "head.weight")}
        save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})

    def _position_embedding(self, positions: Tensor) -> Tensor:
        if self.config.position == "sinusoidal":
            return sinusoidal(positions, self.config.d_model)
        positions = positions + self.config.position_offset
        if positions.numel() and int(positions.max()) >= self.config.max_length:
            raise ManyformError(
                f"position {int(positions.max())} lies past the {self.config.position} position "
                f"table of "
                f"{self.config.max_length} rows; create the model with a larger max_length or "
                "with position='rotary', 'alibi' or 'sinusoidal'")
        if isinstance(self.positions, AxialPositions):
            return self.positions(positions)
        return F.embedding(positions, self.positions.weight)


def load(path: str | Path, *, device: str | torch.device = "cpu") -> Model:
    """Read a model that `Model.save` wrote. Raises ManyformError naming what is missing."""
    from safetensors.torch import load_file
    folder = Path(path)
    try:
        config = ModelConfig.from_dict(json.loads((folder / "config.json").read_text()))
        weights = load_file(str(folder / "model.safetensors"), device=str(device))
    except FileNotFoundError as error:
        raise ManyformError(f"{folder} holds no saved model: {error.filename or error} is missing"
                            ) from error
    except Exception as error:
        if isinstance(error, ManyformError):
            raise
        raise ManyformError(f"the model in {folder} cannot be read: {error}") from error
    model = Model(config).to(device)
    if config.tie:
        weights["head.weight"] = weights.get("embedding.weight", torch.empty(0))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ManyformError(f"the weights in {folder} do not fit its config.json: {error}"
                            ) from error
    return model
