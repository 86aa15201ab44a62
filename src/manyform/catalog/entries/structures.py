"""Depth, normalisation, memory and hierarchy around the same mixers."""

from typing import Any

from manyform.catalog.entry import Entry

# The Transformer of 2017: norms behind the sums, biases, no other norm before the head.
ORIGINAL: dict[str, Any] = dict(residual="post", norm="layer", channel="mlp", activation="relu",
                                bias=True)

ENTRIES = [
    Entry.of("tree", 2015, "Tai et al., Improved semantic representations from tree-structured "
             "long short-term memory networks, arXiv:1503.00075; induced: Choi et al., "
             "arXiv:1707.02786", "structure", "tree", channel=None, n_layers=2),
    Entry.of("transformer", 2017, "Vaswani et al., Attention is all you need, arXiv:1706.03762",
             "structure", "attention", note="the decoder without its look at an encoder",
             **ORIGINAL, position="sinusoidal"),
    Entry.of("universal_transformer", 2018, "Dehghani et al., Universal transformers, "
             "arXiv:1807.03819", "structure", "universal_transformer", norm="layer", channel=None,
             embedding_norm=True, n_layers=1),
    Entry.of("transformer_xl", 2019, "Dai et al., Transformer-XL, arXiv:1901.02860", "structure",
             "transformer_xl", residual="post", norm="layer", channel="mlp", activation="relu"),
    Entry.of("hierarchical_transformer", 2021, "Wu et al., Hi-Transformer, arXiv:2106.01040; Zhang "
             "et al., HIBERT, arXiv:1905.06566", "structure", "hierarchical_transformer",
             note="causal at both levels; segments of equal length unless a delimiter is named",
             channel=None, n_layers=1),
    Entry.of("deepnet", 2022, "Wang et al., DeepNet: Scaling transformers to 1,000 layers, "
             "arXiv:2203.00555", "structure", "attention",
             **{**ORIGINAL, "residual": "deepnorm"}, position="sinusoidal"),
    Entry.of("mixture_of_depths", 2024, "Raposo et al., Mixture-of-depths, arXiv:2404.02258",
             "structure", "attention : mixture_of_depths + none",
             note="a threshold routes in training too, where the paper takes the top tokens"),
    Entry.of("hnet", 2025, "Hwang et al., Dynamic chunking for end-to-end hierarchical sequence "
             "modeling, arXiv:2507.07955", "structure", "2 mamba2 + none : hnet + none : "
             "2 mamba2 + none", note="one stage, all of one width", n_layers=5),
    Entry.of("residual_dual", 2023, "Xie et al., ResiDual: Transformer with dual residual "
             "connections, arXiv:2304.14802", "structure", "attention",
             **{**ORIGINAL, "residual": "residual_dual"}, position="sinusoidal"),
]
