"""Zamba2: Mamba-2 layers, of which some hear Transformer blocks that they share."""

from __future__ import annotations

import math
from typing import Any

from manyform.errors import ManyformError
from manyform.exchange.families.common import SIZES, Rope
from manyform.exchange.families.hybrid import JAMBA
from manyform.exchange.family import Family
from manyform.exchange.settings import (
    ACTIVATIONS,
    Both,
    Choice,
    Draft,
    Fields,
    Fixed,
    Key,
    Layer,
    Only,
    Unfit,
    first,
    whole,
)
from manyform.exchange.tensors import Rules, joined, taps
from manyform.model import Model

KINDS = {"linear_attention": "mamba2", "mamba": "mamba2", "hybrid": "zamba2"}
"""Their names of a layer, new and old, to ours."""
LEAST = 2.0**-126
"""Stands for no bound: transformers takes its logarithm."""
_54 = (["mamba"] + (["mamba"] * 5 + ["hybrid"]) * 7 + ["mamba"] * 4 + ["hybrid"] + ["mamba"] * 3
       + ["hybrid"] + ["mamba"] * 2)
"""The layers where a file lists none: those of the model of 2.7B parameters."""


def _read_layers(theirs: Fields, draft: Draft) -> None:
    """The shared blocks take turns among the layers that hear one."""
    n, blocks = draft.config["n_layers"], theirs.get("num_mem_blocks", 1)
    kinds = theirs.get("layers_block_type", theirs.get("layer_types", _54))
    if len(kinds) != n or not set(kinds) <= set(KINDS) or "hybrid" not in kinds:
        raise ManyformError(f"{theirs.where} must list {n} layers as layers_block_type, each "
                            f"{', '.join(map(repr, KINDS))} and one at least 'hybrid', not "
                            f"{kinds!r}")
    heard = 0
    for kind in kinds:
        share = None
        if kind == "hybrid":
            share, heard = f"block{heard % blocks}", heard + 1
        draft.layers.append(Layer(KINDS[kind], None, share=share))


def _write_layers(model: Model, theirs: dict[str, Any]) -> None:
    layers = model.config.layers
    if any(layer.mixer not in ("mamba2", "zamba2") or layer.channel for layer in layers):
        raise Unfit("its layers are not only mamba2 and zamba2, without channels")
    theirs["layers_block_type"] = ["linear_attention" if layer.mixer == "mamba2" else "hybrid"
                                   for layer in layers]
    shared = [i for i, layer in zip(model.blocks.order, layers, strict=True)
              if layer.mixer == "zamba2"]
    theirs["num_mem_blocks"] = len(set(shared))


def _read(theirs: Fields, draft: Draft) -> None:
    """Options of both mixers. Their time steps have a lower bound only."""
    d, n = theirs.get("hidden_size"), theirs.get("num_attention_heads", 32)
    expand, heads = theirs.get("mamba_expand", 2), theirs.get("n_mamba_heads", 8)
    eps, low = theirs.get("rms_norm_eps", 1e-5), float(theirs.get("time_step_min", 0.001))
    mamba = {"d_state": theirs.get("mamba_d_state", 64), "expand": expand,
             "head_dim": int(expand * d) // heads, "n_groups": theirs.get("mamba_ngroups", 1),
             "conv_size": theirs.get("mamba_d_conv", 4),
             "dt_limit": (low, math.inf) if low > LEAST else None,
             "bias": theirs.get("add_bias_linear", False)}
    memory = {"n_heads": n, "kv_heads": theirs.get("num_key_value_heads", n),
              "position": "rotary" if theirs.get("use_mem_rope", False) else "none",
              "width": theirs.get("intermediate_size", 4 * d),
              "rank": theirs.get("adapter_rank", 128), "norm_eps": eps,
              "adapt_attention": theirs.get("use_shared_attention_adapter", False)}
    for option, value in mamba.items():
        draft.set(f"mamba2.{option}", value)
    for option, value in {**mamba, **memory}.items():
        draft.set(f"zamba2.{option}", value)
    Rope(mixer="zamba2", share=False).read(
        theirs, draft if memory["position"] == "rotary" else Draft())


def _write(model: Model, theirs: dict[str, Any]) -> None:
    part: Any = first(model, "zamba2")
    a, m = part.attention, part.uses[0].mamba
    low, high = m.dt_limit or (LEAST, math.inf)
    if high != math.inf:
        raise Unfit(f"its time steps have an upper bound (dt_limit) of {high}")
    Rope(share=False).write_of(a, theirs)
    theirs.update(
        mamba_d_state=m.d_state, mamba_expand=whole(m.expand), n_mamba_heads=m.n_heads,
        mamba_ngroups=m.n_groups, mamba_d_conv=m.conv_size, time_step_min=low,
        add_bias_linear=m.bias, num_attention_heads=a.n_heads, num_key_value_heads=a.kv_heads,
        use_mem_rope=a.position == "rotary", intermediate_size=part.mlp.width,
        adapter_rank=part.rank, rms_norm_eps=part.norm_eps,
        use_shared_attention_adapter=part.adapt_attention)


def _copies(model: Model) -> dict[str, str]:
    """The shared blocks of later layers: those of the first layer that hears the same one."""
    name, order = "model.layers.{}.shared_transformer.", model.blocks.order
    return {name.format(i): name.format(order.index(block)) for i, block in enumerate(order)
            if order.index(block) != i}


def _low_rank(ours: str, theirs: str) -> Rules:
    """A use's additions: at their place in the list of the shared block that it hears."""
    where = f"/model.layers.{{first}}.shared_transformer.{theirs}_adapter_list.{{rank}}"
    return {f"mixer.uses.{ours}.down": f"{where}.0", f"mixer.uses.{ours}.up": f"{where}.1"}


def _mamba(ours: str, theirs: str) -> Rules:
    names = ("in_proj", "out_proj", "dt_bias", "A_log", "D")
    return {**{f"{ours}.{name}": f"{theirs}.{name}" for name in names},
            f"{ours}.norm_weight": f"{theirs}.norm.weight",
            f"{ours}.conv_bias": f"{theirs}.conv1d.bias",
            f"{ours}.conv_weight": taps(f"{theirs}.conv1d.weight")}


def _sizes(block: Any) -> list[int]:
    a = block.mixer.attention
    return [a.n_heads * a.head_dim, *[a.kv_heads * a.head_dim] * 2]


ZAMBA2 = Family(
    "zamba2", "Zamba2ForCausalLM",
    (*SIZES, Key("rms_norm_eps", "norm_eps", 1e-5),
     # Where the head is not tied, transformers 5.23 unties the shared blocks too.
     Only("tie_word_embeddings", (True,)), Fixed({"tie": True}),
     Both(_read_layers, _write_layers), Both(_read, _write),
     Choice("hidden_act", "zamba2.activation", ACTIVATIONS, "gelu"),
     Only("use_long_context", (False,)), Only("use_shared_mlp_adapter", (True,))),
    JAMBA.top,
    {"mixer_norm": "input_layernorm", **_mamba("mixer", "mamba"),
     "mixer.attention_norm": "shared_transformer.input_layernorm",
     "mixer.attention.qkv": joined(
         *(f"shared_transformer.self_attn.{n}_proj" for n in "qkv"), sizes=_sizes),
     "mixer.attention.out": "shared_transformer.self_attn.o_proj",
     "mixer.mlp_norm": "shared_transformer.pre_ff_layernorm",
     "mixer.mlp.gate_up": "shared_transformer.feed_forward.gate_up_proj",
     "mixer.mlp.down": "shared_transformer.feed_forward.down_proj",
     **_low_rank("gate_up", "feed_forward.gate_up_proj"),
     **{rule: name for n in "qkv"
        for rule, name in _low_rank(n, f"self_attn.linear_{n}").items()},
     "mixer.uses.out": "linear", "mixer.uses.norm": "mamba_decoder.input_layernorm",
     **_mamba("mixer.uses.mamba", "mamba_decoder.mamba")},
    harmless=frozenset({
        "use_mamba_kernels", "use_mem_eff_path", "chunk_size", "time_step_max", "time_step_floor",
        "num_logits_to_keep", "max_position_embeddings", "rope_parameters",
        # They follow from others; its convolution always has a bias, its steps that bound alone.
        "attention_hidden_size", "attention_head_dim", "mamba_headdim", "kv_channels",
        "num_query_groups", "hybrid_layer_ids", "use_conv_bias", "time_step_limit"}),
    copies=_copies)

FAMILIES = [ZAMBA2]
