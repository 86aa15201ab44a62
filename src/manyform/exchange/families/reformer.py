"""Reformer: hashed attention and attention within blocks, on reversible streams."""

from __future__ import annotations

import math
from typing import Any

from manyform.errors import ManyformError
from manyform.exchange.family import Family
from manyform.exchange.settings import (
    Both,
    Choice,
    Draft,
    Fields,
    Fixed,
    Key,
    Layer,
    Only,
    Unfit,
)
from manyform.exchange.tensors import Layout, Rules, qkv
from manyform.model import Model

KINDS = {"lsh": "reformer", "local": "bigbird"}
"""Their names of attention to ours: a block and those before it are BigBird's, with nothing else.
"""


def _read(theirs: Fields, draft: Draft) -> None:
    kinds = theirs.get("attn_layers", ["local", "lsh"] * 3)
    if not kinds or not set(kinds) <= set(KINDS):
        raise ManyformError(f"{theirs.where} must list its layers as attn_layers, each 'lsh' or "
                            f"'local', not {kinds!r}")
    theirs.get("num_hidden_layers", len(kinds))
    draft.set("n_layers", len(kinds))
    draft.layers += [Layer(KINDS[kind], "mlp") for kind in kinds]
    chunk, block = (theirs.get(f"{kind}_attn_chunk_length", 64) for kind in KINDS)
    heads = {"n_heads": theirs.get("num_attention_heads", 12),
             "head_dim": theirs.get("attention_head_size", 64), "position": "none"}
    for option, value in {**heads, "block": block, "global_blocks": 0, "random_blocks": 0,
                          "window_blocks": 1 + theirs.get("local_num_chunks_before", 1)}.items():
        draft.set(f"bigbird.{option}", value)
    if "lsh" not in kinds:
        for key in ("num_buckets", "num_hashes", "hash_seed"):
            theirs.get(key, None)
        return
    both = math.lcm(chunk, block) if "local" in kinds else chunk
    if both not in (chunk, block):
        raise ManyformError(f"{theirs.where} has chunks of {chunk} and blocks of {block} tokens; "
                            "manyform represents only those of which one is a multiple of the "
                            "other")
    buckets = theirs.get("num_buckets", 0)
    if not buckets:
        raise ManyformError(f"{theirs.where} leaves num_buckets to the length of the first "
                            "sequence that a model sees; set it (about 2 length / "
                            "lsh_attn_chunk_length)")
    # Without a seed it draws new rotations at every call; these then are as good as any.
    for option, value in {**heads, "chunk": chunk, "multiple": both, "buckets": buckets,
                          "hashes": theirs.get("num_hashes", 1), "causal": False,
                          "released": True, "hash_seed": theirs.get("hash_seed", 0)}.items():
        draft.set(f"reformer.{option}", value)


def _write(model: Model, theirs: dict[str, Any]) -> None:
    back = {ours: kind for kind, ours in KINDS.items()}
    mixers: dict[str, Any] = {}
    for block, layer in zip(model.blocks.layers, model.config.layers, strict=True):
        if layer.mixer not in back:
            raise Unfit(f"its mixer is {layer.mixer}, not reformer or bigbird")
        mixers.setdefault(layer.mixer, block.mixer)
    theirs["attn_layers"] = [back[layer.mixer] for layer in model.config.layers]
    one = next(iter(mixers.values()))
    theirs.update(num_attention_heads=one.n_heads, attention_head_size=one.head_dim)
    if "bigbird" in mixers:
        local = mixers["bigbird"]
        theirs.update(local_attn_chunk_length=local.block,
                      local_num_chunks_before=local.window_blocks - 1)
    if "reformer" in mixers:
        hashed = mixers["reformer"]
        if hashed.hash_seed is None:
            raise Unfit("its rotations come from no seed (hash_seed)")
        theirs.update(
            lsh_attn_chunk_length=hashed.chunk, num_hashes=hashed.hashes,
            hash_seed=hashed.hash_seed, num_buckets=hashed.buckets if len(hashed.factors) == 1
            else list(hashed.factors))


def _read_positions(theirs: Fields, draft: Draft) -> None:
    axial = theirs.get("axial_pos_embds", True)
    draft.set("position", "axial" if axial else "learned")
    if axial:
        draft.set("axial_shape", tuple(theirs.get("axial_pos_shape", (64, 64))))
        draft.set("axial_dims", tuple(theirs.get("axial_pos_embds_dim", (64, 192))))
    else:
        for key in ("axial_pos_shape", "axial_pos_embds_dim"):
            theirs.get(key, None)


def _write_positions(model: Model, theirs: dict[str, Any]) -> None:
    config = model.config
    theirs["axial_pos_embds"] = config.position == "axial"
    if config.axial_shape is not None and config.axial_dims is not None:
        theirs.update(axial_pos_shape=list(config.axial_shape),
                      axial_pos_embds_dim=list(config.axial_dims))


def _axis(number: int) -> Layout:
    """A table of one axis, which they keep with the other axis of length 1."""
    name = f"reformer.embeddings.position_embeddings.weights.{number}"
    return Layout((name,), lambda parts, block: parts[0].squeeze(1 - number),
                  lambda whole, block: [whole.unsqueeze(1 - number)])


_BLOCK: Rules = {
    "mixer_norm": "attention.layer_norm", "mixer.out": "attention.output.dense",
    "mixer.qk": "attention.self_attention.query_key", "mixer.v": "attention.self_attention.value",
    "mixer.qkv": qkv(*(f"attention.self_attention.{n}" for n in ("query", "key", "value"))),
    "channel_norm": "feed_forward.layer_norm", "channel.up": "feed_forward.dense.dense",
    "channel.down": "feed_forward.output.dense"}

REFORMER = Family(
    "reformer", "ReformerModelWithLMHead",
    (Key("vocab_size", "vocab_size", 320), Key("hidden_size", "d_model", 256),
     Key("feed_forward_size", "channel.width", 512),
     Choice("hidden_act", "channel.activation", default="relu"),
     Key("layer_norm_eps", "norm_eps", 1e-12), Key("max_position_embeddings", "max_length", 4096),
     Both(_read, _write), Both(_read_positions, _write_positions),
     Only("is_decoder", (True,), False), Only("tie_word_embeddings", (False,)),
     Only("lsh_num_chunks_before", (1,)), Only("lsh_num_chunks_after", (0,)),
     Only("local_num_chunks_after", (0,)),
     Fixed({"norm": "layer", "residual": "reversible", "tie": False, "head_bias": True,
            "channel.bias": True})),
    {"embedding": "reformer.embeddings.word_embeddings", "positions.rows": _axis(0),
     "positions.columns": _axis(1),
     "positions": "reformer.embeddings.position_embeddings.embedding",
     "final_norm": "reformer.encoder.layer_norm", "head": "lm_head.decoder",
     "head.bias": "lm_head.bias"},
    _BLOCK, layer="reformer.encoder.layers.{i}.", prefix="reformer.",
    ignored=("lm_head.decoder.bias", "mask_value_float16", "mask_value_float32"),
    harmless=frozenset({"axial_norm_std", "chunk_size_lm_head", "num_chunks_before",
                        "local_attention_probs_dropout_prob", "lsh_attention_probs_dropout_prob"}))

FAMILIES = [REFORMER]
