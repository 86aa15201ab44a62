"""A model's decoding step for one sequence, with the states in buffers that it owns.

A step of the model itself makes about thirty small calls a block, each of which costs more than the
little it computes. Here a block is two calls of compiled loops, at most, and a token costs hardly
more than reading the weights once.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

import manyform.decoding.attention
import manyform.decoding.mamba2  # noqa: F401  (both register their steps)
from manyform.block import BlockState
from manyform.decoding.parts import Plain, Site, Unfit, array, linear, make, norm, scratch
from manyform.errors import ManyformError
from manyform.model import Model, ModelState
from manyform.ops.kernels import threads, usable
from manyform.ops.operation import operation
from manyform.precision import autocast


class Decoder:
    """Reads one token after the other; made by `Decoder.of`.

    The model's parameters must stay as they are while a decoder lives. Blocks whose mixer or
    channel has no compiled step go through its own forward.
    """

    def __init__(self, model: Model, state: ModelState | None, precision: str = "fp32") -> None:
        self.model, self.precision = model, precision
        weights = torch.bfloat16 if precision == "bf16" else torch.float32
        self._stream = scratch(model.config.d_model)
        self._shared: dict[str, Any] = {}
        self._blocks = []
        for block in model.blocks.layers:
            if (block.residual not in ("none", "pre") or block.mixer.bare
                    or model.config.exit_threshold is not None):
                raise Unfit
            site = Site(self._stream, block.mixer_norm, block.residual == "pre", self._shared,
                        weights)
            mixer, channel = make(block.mixer, site), None
            if block.channel is not None:
                assert block.channel_norm is not None
                channel = make(block.channel, site._replace(norm=block.channel_norm))
            self._blocks.append((mixer, channel))
        self._parts = [part for pair in self._blocks for part in pair if part is not None]
        weight, _ = linear(model.head, weights)
        self._head = (self._stream, *norm(model.final_norm), weight, scratch(model.config.d_model))
        self._embedding = array(model.embedding.weight)
        self.load(state)

    @classmethod
    def of(cls, model: Model, state: ModelState | None, precision: str = "fp32",
           ) -> Decoder | None:
        """A decoder that goes on from `state` (None: the start), which is never changed.

        precision: "bf16" keeps its matrices in bfloat16, half the bytes that a token reads; sums,
        activations and states stay float32.
        None where nothing would be gained or the result would differ: more than one row, another
        device, parameters other than float32, autocast, a prefix yet to be read, a subclass of the
        model or hooks on it, no numba, a norm behind the embedding, more at the head than a matrix
        product, a residual structure other than "pre" and "none", early exit, or no block with a
        compiled step.
        """
        config = model.config
        plain_ends = model._plain_head and not (config.embedding_norm or config.embedding_map
                                                or config.segments)
        plain_call = type(model) is Model and plain_ends and not any(
            m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        one_row = state is None or state.position.shape[0] == 1
        if not (plain_call and one_row and model.causal and usable(*model.parameters())
                and not torch.is_autocast_enabled("cpu")
                and not (config.prefix_tokens and (state is None or not int(state.position[0])))
                and all(p.dtype == torch.float32 for p in model.parameters())):
            return None
        try:
            decoder = cls(model, state, precision)
        except Unfit:
            return None
        return None if all(isinstance(p, Plain) for p in decoder._parts) else decoder

    def load(self, state: ModelState | None) -> None:
        """Go on from another state of one row (None: the start)."""
        self.position = 0 if state is None else int(state.position[0])
        for i, (mixer, channel) in enumerate(self._blocks):
            before = BlockState(None, None) if state is None else state.layers[i]
            mixer.load(before.mixer)
            if channel is not None:
                channel.load(before.channel)

    def step(self, token: int) -> Tensor:
        """Read one token: logits (1, vocab_size) float32 after it, without gradients.

        Raises ManyformError for a token outside the vocabulary, and past the end of a learned
        position table.
        """
        if not 0 <= token < self.model.config.vocab_size:
            raise ManyformError(f"token {token} is outside the vocabulary of "
                                f"{self.model.config.vocab_size}")
        return decode_step(self, token)

    def state(self) -> ModelState:
        """The state after every token read, a copy: what the model itself would give."""
        return ModelState(torch.tensor([self.position]), tuple(
            BlockState(mixer.state(), None if channel is None else channel.state())
            for mixer, channel in self._blocks))

    def _embed(self, token: int) -> None:
        config = self.model.config
        x = self._stream[:config.d_model]
        np.multiply(self._embedding[token], np.float32(config.embedding_scale), out=x)
        if config.position == "sinusoidal":
            x *= np.float32(math.sqrt(config.d_model))
        if config.position != "none":
            x += self.model._position_embedding(torch.tensor(self.position)).numpy()


def _flops(decoder: Decoder, token: int) -> int:
    """What one token more costs the model, after those that its position tells of."""
    config, stack = decoder.model.config, decoder.model.blocks
    n = decoder.position + config.prefix_tokens
    before = stack.cost(n).flops if n else 0
    return 2 * config.d_model * config.vocab_size + stack.cost(n + 1).flops - before


@operation(flops=_flops)
@torch.no_grad()
def decode_step(decoder: Decoder, token: int) -> Tensor:
    """logits, state = model(token, state), with the state in the decoder.

    Returns logits: (1, vocab_size) float32.
    """
    state = decoder.state()
    with autocast(torch.device("cpu"), decoder.precision):
        logits, after = decoder.model(torch.tensor([[token]]), state)
    decoder.load(after)
    return logits[:, -1].float() if decoder.precision == "bf16" else logits[:, -1]


@decode_step.path("compiled")
@torch.no_grad()
def _(decoder: Decoder, token: int) -> Tensor:
    """Compiled loops over the decoder's own buffers, two a block; see `manyform.ops.kernels.decode`
    (where the first call on a machine compiles for some seconds, and keeps the result)."""
    from manyform.ops.kernels import decode
    count = threads()
    decoder._embed(token)
    decoder._shared.clear()
    decoder._shared["tokens"] = torch.tensor([[token]])
    with autocast(torch.device("cpu"), decoder.precision):  # of parts without a compiled step
        for part in decoder._parts:
            part.step(count)
    logits = torch.empty(1, decoder.model.config.vocab_size)
    decode.head(*decoder._head, logits[0].numpy(), count)
    decoder.position += 1
    return logits
