"""The entries: one short record an architecture."""

from __future__ import annotations

from typing import Any

from manyform.catalog.entry import Entry


def _entry(name: str, year: int, paper: str, family: str, pattern: str, note: str = "",
           **defaults: Any) -> Entry:
    return Entry(name, year, paper, family, pattern, defaults, note)


# Stacked cells straight into the head: no residual stream, norms or channel mixers before 2016.
_STACK: dict[str, Any] = dict(norm="none", residual=False, channel=None, tie=False, n_layers=2,
                              embedding_std=1.0)
# The blocks of state-space papers are the mixer alone.
_ALONE: dict[str, Any] = dict(channel=None)

ENTRIES: dict[str, Entry] = {e.name: e for e in [
    _entry("rnn", 1990, "Elman, Finding structure in time, Cognitive Science 14(2)",
           "recurrent", "rnn", **_STACK),
    _entry("lstm", 1997, "Hochreiter & Schmidhuber, Long short-term memory; forget gate: Gers 2000",
           "recurrent", "lstm", **_STACK),
    _entry("gru", 2014, "Cho et al., Learning phrase representations, arXiv:1406.1078",
           "recurrent", "gru", **_STACK),
    _entry("gpt2", 2019, "Radford et al., Language models are unsupervised multitask learners",
           "attention", "attention", norm="layer", channel="mlp", position="learned", bias=True),
    _entry("linear_attention", 2020, "Katharopoulos et al., Transformers are RNNs, "
           "arXiv:2006.16236", "linear attention", "linear_attention"),
    _entry("alibi", 2021, "Press et al., Train short, test long, arXiv:2108.12409",
           "attention", "attention", position="alibi", norm="layer_no_bias", channel="mlp"),
    _entry("s4d", 2022, "Gu et al., On the parameterization and initialization of diagonal state "
           "space models, arXiv:2206.11893", "state space", "s4d", norm="layer", **_ALONE),
    _entry("hyena", 2023, "Poli et al., Hyena hierarchy, arXiv:2302.10866", "long convolution",
           "hyena", norm="layer", channel="mlp"),
    _entry("llama", 2023, "Touvron et al., LLaMA, arXiv:2302.13971", "attention", "attention",
           position="rotary"),
    _entry("retnet", 2023, "Sun et al., Retentive network, arXiv:2307.08621", "linear attention",
           "retention", channel="mlp", expansion=2.0),
    _entry("mistral", 2023, "Jiang et al., Mistral 7B, arXiv:2310.06825", "attention", "attention",
           "window and grouped keys in the published proportions", position="rotary", window=256,
           kv_groups=4),
    _entry("mamba", 2023, "Gu & Dao, Mamba, arXiv:2312.00752", "state space", "mamba", **_ALONE),
    _entry("gla", 2023, "Yang et al., Gated linear attention transformers, arXiv:2312.06635",
           "linear attention", "gla"),
    _entry("jamba", 2024, "Lieber et al., Jamba, arXiv:2403.19887", "hybrid",
           "4 mamba : 1 attention : 3 mamba", "dense channels where the paper alternates experts",
           position="none"),
    _entry("mamba2", 2024, "Dao & Gu, Transformers are SSMs, arXiv:2405.21060", "state space",
           "mamba2", **_ALONE),
    _entry("delta_net", 2024, "Yang et al., Parallelizing linear transformers with the delta rule, "
           "arXiv:2406.06484", "linear attention", "delta_net"),
    _entry("gated_delta_net", 2024, "Yang et al., Gated delta networks, arXiv:2412.06464",
           "linear attention", "gated_delta_net"),
    _entry("rwkv7", 2025, "Peng et al., RWKV-7 Goose, arXiv:2503.14456", "linear attention",
           "rwkv7", norm="layer", channel="rwkv_channel", tie=False),
]}
