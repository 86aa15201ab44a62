"""Training tokens per second: our mixers against peers, and against our own attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import manyform
from benchmarks.harness import Line, ratio, turns
from manyform.ops import trace
from manyform.precision import autocast
from manyform.training import TrainConfig
from manyform.training.machine import machine_facts
from manyform.training.trainer import Trainer

VOCAB, WIDTH, DEPTH = 1024, 256, 6
AGAINST_ATTENTION = {  # name: (aim at T 1024 or None, aim at T 8192)
    "linear_attention": (1.0, 3.0), "retnet": (1.0, 3.0), "gla": (1.0, 3.0), "mamba2": (1.0, 3.0),
    "gated_delta_net": (0.7, 2.0), "rwkv7": (0.7, 2.0), "s4d": (None, 1.5), "hyena": (None, 1.5),
    "mamba": (None, 1.0),
}

CHUNKED, DELTA, SCAN, CONVOLUTION, SPARSE = (
    (1.0, 3.0), (0.7, 2.0), (None, 1.0), (None, 1.5), (None, 3.0))
FAMILY: dict[str, tuple[tuple[float | None, float], dict[str, Any]]] = {
    "lightning": (CHUNKED, {}), "hgrn2": (CHUNKED, {}), "rwkv6": (CHUNKED, {}),
    "xlstm_7b": (CHUNKED, {}), "performer": (CHUNKED, {}), "cosformer": (CHUNKED, {}),
    "kda": (DELTA, {}), "rwkv4": (SCAN, {}), "lru": (SCAN, {}), "min_gru": (SCAN, {}),
    "min_lstm": (SCAN, {}), "qrnn": (SCAN, {}), "hawk": (SCAN, {}), "mamba3": (SCAN, {}),
    "s4": (CONVOLUTION, {}), "h3": (CONVOLUTION, {}), "striped_hyena": (CONVOLUTION, {}),
    "longformer": (SPARSE, {"window": 256}), "bigbird": (SPARSE, {"window_blocks": 8}),
    "sparse_transformer": (SPARSE, {}), "native_sparse_attention": (SPARSE, {"window": 256}),
    "transformer_xl": (SPARSE, {}), "ttt_linear": (CHUNKED, {}), "ttt_mlp": (CHUNKED, {}),
    "titans_mag": (CHUNKED, {}),
}
"""Entries beyond the foundation's, by how they compute: aims, and what sets them on equal terms."""


class RandomBatches:
    """The same random tokens every step: speed does not depend on what they say."""

    def __init__(self, batch: int, length: int, device: str) -> None:
        self.tokens = torch.randint(0, VOCAB, (batch, length), device=device)
        self.targets, self.reset = self.tokens, None

    def batch(self, step: int) -> RandomBatches:
        return self


def ours(name: str, batch: int, length: int, device: str, **options: Any,
         ) -> tuple[Callable[[], int], dict[str, str]]:
    """One training step of a catalog entry as `manyform train` makes it, and the paths it takes."""
    torch.manual_seed(0)
    settings = {"vocab_size": VOCAB, "d_model": WIDTH, "n_layers": DEPTH, **options}
    model = manyform.create(name, **settings).to(device)
    trainer = Trainer(model, RandomBatches(batch, length, device), TrainConfig(
        steps=10**6, batch_size=batch, length=length, precision="auto", spike=0.0,
        objective="next" if model.causal else "masked"))
    with trace() as seen:
        trainer.step()
    return lambda: trainer.step().tokens, {op: path for op, path in sorted(seen)}


def theirs(model: torch.nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], batch: int,
           length: int, device: str, precision: str) -> Callable[[], int]:
    """One training step of a peer's model, with the same optimizer and precision."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(0, VOCAB, (batch, length), device=device)

    def step() -> int:
        with autocast(torch.device(device), precision):
            value = loss(tokens)
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return tokens.numel()
    return step


class TorchRecurrent(torch.nn.Module):
    """Two layers of torch's own recurrent kernels between an embedding and a head."""

    def __init__(self, layers: type[torch.nn.Module]) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, WIDTH)
        self.layers = layers(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(WIDTH, VOCAB, bias=False)

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.layers(self.embedding(tokens))[0])
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


def against_peers(device: str, rounds: int) -> list[Line]:
    """At T 512: mamba and mamba2 against transformers and mambapy, batch 2; the classic recurrent
    networks against torch's, batch 8."""
    import transformers
    from mambapy.mamba import Mamba, MambaConfig
    length = 512
    hf: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": WIDTH, "num_hidden_layers": DEPTH,
                          "use_cache": False}
    mamba1 = transformers.MambaForCausalLM(transformers.MambaConfig(**hf))
    mamba2 = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(
        **hf, head_dim=64, num_heads=8, n_groups=1, state_size=64, chunk_size=256))
    # mambapy.lm needs a GPU package; its layers do not, so the embedding and the head are ours.
    mambapy = torch.nn.Sequential(torch.nn.Embedding(VOCAB, WIDTH),
                                  Mamba(MambaConfig(d_model=WIDTH, n_layers=DEPTH)),
                                  torch.nn.Linear(WIDTH, VOCAB, bias=False))

    def hf_loss(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tokens: model(input_ids=tokens, labels=tokens).loss

    def mambapy_loss(tokens: torch.Tensor) -> torch.Tensor:
        logits = mambapy(tokens)
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    classic: list[Any] = []
    for name, layers in (("rnn", torch.nn.RNN), ("gru", torch.nn.GRU), ("lstm", torch.nn.LSTM)):
        theirs_ = TorchRecurrent(layers)
        classic.append((name, 1, f"torch.nn.{layers.__name__}", (theirs_, theirs_.loss), rounds, 8,
                        {"n_layers": 2}))
    lines = []
    for name, aim, peer, make, turn, batch, options in (
            ("mamba", 200, "transformers Mamba", (mamba1, hf_loss(mamba1)), 1, 2, {}),
            ("mamba", 8, "mambapy Mamba", (mambapy, mambapy_loss), rounds, 2, {}),
            ("mamba2", 5, "transformers Mamba2", (mamba2, hf_loss(mamba2)), rounds, 2,
             {"d_state": 64}), *classic):
        work, paths = ours(name, batch, length, device, **options)
        best: tuple[float, Line] | None = None
        for precision in ("bf16", "fp32") if turn > 1 else ("bf16",):
            step = theirs(*make, batch, length, device, precision)
            rates = turns({"ours": work, "theirs": step}, rounds=turn, device=device)
            r = ratio(rates, "ours", "theirs")
            line = Line(f"{name} training, T {length}, batch {batch}", "tok/s",
                        max(rates["ours"]), max(rates["theirs"]), r, aim,
                        f"{peer} ({precision})", paths=paths)
            if best is None or r < best[0]:  # the peer at its better precision
                best = (r, line)
        assert best is not None
        lines.append(best[1])
    return lines


def against_attention(device: str, rounds: int) -> list[Line]:
    """The foundation's linear-time mixers against our own attention model."""
    return _against_llama(device, rounds, {n: (a, {}) for n, a in AGAINST_ATTENTION.items()})


def family_against_attention(device: str, rounds: int) -> list[Line]:
    """The other entries that are linear in the length, likewise."""
    return _against_llama(device, rounds, FAMILY)


def _against_llama(device: str, rounds: int,
                   entries: dict[str, tuple[tuple[float | None, float], dict[str, Any]]],
                   ) -> list[Line]:
    """A line for each entry and length that has an aim; 8,192 tokens a batch."""
    lines = []
    for index, length in enumerate((1024, 8192)):
        batch = 8192 // length
        works, paths = {}, {}
        works["llama"], paths["llama"] = ours("llama", batch, length, device)
        for name, (aims, options) in entries.items():
            if aims[index] is not None:
                works[name], paths[name] = ours(name, batch, length, device,
                                                  max_length=length, **options)
        rates = turns(works, rounds=rounds, seconds=0.5, device=device)
        for name in works:
            if name != "llama":
                aim = entries[name][0][index]
                assert aim is not None
                lines.append(Line(f"{name} training, T {length}", "tok/s", max(rates[name]),
                                  max(rates["llama"]), ratio(rates, name, "llama"), aim,
                                  "our attention (llama)", paths=paths[name]))
    return lines


def share_of_peak(device: str, rounds: int) -> list[Line]:
    """llama d 512, 6 layers, T 1024: training operations against the measured matmul peak."""
    batch, length = 8, 1024
    work, paths = ours("llama", batch, length, device, d_model=512)
    model = manyform.create("llama", vocab_size=VOCAB, d_model=512, n_layers=DEPTH)
    flops = model.cost(length).training_flops_per_token
    rate = max(turns({"ours": work}, rounds=rounds, device=device)["ours"])
    facts = machine_facts(device)
    peak = facts.bf16_gflops if facts.bf16_gains else facts.fp32_gflops
    reached = rate * flops / 1e9
    return [Line("llama d 512 training, T 1024: share of the matmul peak", "GFLOP/s", reached, peak,
                 reached / peak, 0.4, "measured peak of one product",
                 f"{rate:,.0f} tok/s", paths=paths)]
