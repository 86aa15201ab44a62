"""Encoders in BERT's shape: FNet, Longformer, Nystromformer, BigBird, also as a decoder."""

from __future__ import annotations

from typing import Any

from manyform.errors import ManyformError
from manyform.exchange.families.common import SIZES, tied
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
    Setting,
    Unfit,
)
from manyform.exchange.tensors import Layout, Rules, joined, qkv
from manyform.model import Model


def bert(eps: float, segments: int, act: str = "gelu") -> tuple[Setting, ...]:
    """What all of them share; the defaults differ."""
    return (*SIZES, Key("intermediate_size", "channel.width"),
            Choice("hidden_act", "channel.activation", default=act),
            Key("layer_norm_eps", "norm_eps", eps), tied(True),
            Key("type_vocab_size", "segments", segments),
            Fixed({"norm": "layer", "residual": "post", "position": "learned", "head_bias": True,
                   "embedding_norm": True, "channel.bias": True}))


def _top(name: str) -> Rules:
    return {"embedding": f"{name}.embeddings.word_embeddings",
            "positions": f"{name}.embeddings.position_embeddings",
            "segments": f"{name}.embeddings.token_type_embeddings",
            "embedding_norm": f"{name}.embeddings.LayerNorm",
            "embedding_map": f"{name}.embeddings.projection",
            "head": "cls.predictions.decoder", "head.bias": "cls.predictions.bias",
            "head_map": "cls.predictions.transform.dense",
            "head_norm": "cls.predictions.transform.LayerNorm"}


_BLOCK: Rules = {
    "mixer_norm": "attention.output.LayerNorm", "channel_norm": "output.LayerNorm",
    "mixer.qkv": qkv("attention.self.query", "attention.self.key", "attention.self.value"),
    "mixer.out": "attention.output.dense", "channel.up": "intermediate.dense",
    "channel.down": "output.dense"}
_POOLER = ("pooler.dense.weight", "pooler.dense.bias", "pooler.weight", "pooler.bias",
           "position_ids", "token_type_ids", "predictions.decoder.bias", "lm_head.decoder.bias")
"""A head for classification that no logit depends on, and what is computed or tied."""


FNET = Family(
    "fnet", "FNetForMaskedLM",
    (*bert(1e-12, 4, "gelu_new"), Key("max_position_embeddings", "max_length", 512),
     Choice("hidden_act", "head_map", default="gelu_new"), Fixed({"embedding_map": True})),
    _top("fnet"), {**_BLOCK, "mixer_norm": "fourier.output.LayerNorm"},
    layer="fnet.encoder.layer.{i}.", prefix="fnet.", mixer="fnet", channel="mlp",
    ignored=_POOLER, harmless=frozenset({"use_tpu_fourier_optimizations", "tpu_short_seq_length"}))


def _heads(name: str) -> tuple[Setting, ...]:
    return (Key("num_attention_heads", f"{name}.n_heads"), Fixed({f"{name}.bias": True}))


NYSTROMFORMER = Family(
    "nystromformer", "NystromformerForMaskedLM",
    (*bert(1e-5, 2, "gelu_new"), *_heads("nystromformer"),
     Key("max_position_embeddings", "max_length", 510, into=lambda n: n + 2, back=lambda n: n - 2),
     Choice("hidden_act", "head_map", default="gelu_new"), Fixed({"position_offset": 2}),
     Key("num_landmarks", "nystromformer.landmarks", 64),
     Both(lambda f, draft: draft.set("nystromformer.conv", _taps(f)),
          lambda model, theirs: _write_taps(model, theirs)),
     Only("inv_coeff_init_option", (False,))),
    _top("nystromformer"),
    {**_BLOCK, "mixer.qkv": joined(
        *(f"attention.self.{n}" for n in ("query", "key", "value")),
        sizes=lambda block: [block.mixer.n_heads * block.mixer.head_dim] * 3),
     "mixer.conv": Layout(("attention.self.conv.weight",),
                                    lambda parts, block: parts[0][:, 0, :, 0],
                                    lambda whole, block: [whole[:, None, :, None]])},
    layer="nystromformer.encoder.layer.{i}.", prefix="nystromformer.", mixer="nystromformer",
    channel="mlp", ignored=_POOLER,
    harmless=frozenset({"segment_means_seq_len", "add_cross_attention"}))


def _taps(theirs: Fields) -> int | None:
    """`conv_kernel_size`; null is no convolution, silence 65 taps."""
    size = theirs.get("conv_kernel_size", 65)
    return None if theirs.values.get("conv_kernel_size", size) is None else size


def _write_taps(model: Model, theirs: dict[str, Any]) -> None:
    mixer: Any = model.blocks.layers[0].mixer
    theirs["conv_kernel_size"] = None if mixer.conv is None else mixer.conv.shape[1]


def _read_windows(theirs: Fields, draft: Draft) -> None:
    n, given = draft.config["n_layers"], theirs.get("attention_window", 512)
    windows = [given] * n if isinstance(given, int) else given
    if len(windows) != n:
        raise ManyformError(f"{theirs.where} lists {len(windows)} attention windows for {n} layers")
    draft.layers += [Layer("longformer", "mlp", {"window": w}) for w in windows]
    draft.set("position_offset", theirs.get("pad_token_id", 1) + 1)


def _write_windows(model: Model, theirs: dict[str, Any]) -> None:
    mixers: list[Any] = [block.mixer for block in model.blocks.layers]
    if any(getattr(m, "span", 1) % 2 or m.dilation != 1 for m in mixers):
        raise Unfit("a window is odd, or dilated")
    theirs["attention_window"] = [m.span for m in mixers]
    theirs["pad_token_id"] = model.config.position_offset - 1


def _global_kv() -> Layout:
    def sizes(block: Any) -> list[int]:
        return [block.mixer.kv_heads * block.mixer.head_dim] * 2
    return joined("attention.self.key_global", "attention.self.value_global", sizes=sizes)


LONGFORMER = Family(
    "longformer", "LongformerForMaskedLM",
    (*bert(1e-12, 2), *_heads("longformer"), Both(_read_windows, _write_windows),
     Key("max_position_embeddings", "max_length", 512),
     Fixed({"head_map": "gelu", "longformer.causal": False, "longformer.position": "none",
            "longformer.globals": 1})),  # the first token is global, as for its published tasks
    {**_top("longformer"), "head": "lm_head.decoder", "head.bias": "lm_head.bias",
     "head_map": "lm_head.dense", "head_norm": "lm_head.layer_norm"},
    {**_BLOCK, "mixer.global_q": "attention.self.query_global", "mixer.global_kv": _global_kv()},
    layer="longformer.encoder.layer.{i}.", prefix="longformer.", mixer="longformer",
    channel="mlp", ignored=_POOLER,
    harmless=frozenset({"attention_mode", "gradient_checkpointing", "ignore_attention_mask",
                        "onnx_export"}))

def _read_bird(theirs: Fields, draft: Draft) -> None:
    """A dense decoder, or an encoder with sparse attention."""
    decoder, kind = theirs.get("is_decoder", False), theirs.get("attention_type", "block_sparse")
    if (kind == "original_full") != decoder:
        raise ManyformError(f"{theirs.where} sets attention_type={kind!r} of "
                            f"{'a decoder' if decoder else 'an encoder'}; manyform represents "
                            "'original_full' decoders and 'block_sparse' encoders")
    mixer = "attention" if decoder else "bigbird"
    for option, value in {"n_heads": theirs.get("num_attention_heads"), "position": "none",
                          "bias": theirs.get("use_bias", True), "out_bias": True}.items():
        draft.set(f"{mixer}.{option}", value)
    size, few = theirs.get("block_size", 64), theirs.get("num_random_blocks", 3)
    if not decoder:
        # Its random blocks are drawn in training; in evaluation each is the first block again.
        for option, value in {"block": size, "random_blocks": few, "window_blocks": 3,
                              "global_blocks": 1, "random": "first", "causal": False,
                              "dense_length": (5 + 2 * few) * size}.items():
            draft.set(f"bigbird.{option}", value)
    draft.layers += [Layer(mixer, "mlp") for _ in range(draft.config["n_layers"])]


def _write_bird(model: Model, theirs: dict[str, Any]) -> None:
    mixer: Any = model.blocks.layers[0].mixer
    name = model.config.layers[0].mixer
    if name not in ("attention", "bigbird"):
        raise Unfit(f"its mixer is {name}, not attention or bigbird")
    sparse = name == "bigbird"
    theirs.update(is_decoder=not sparse, num_attention_heads=mixer.n_heads, use_bias=mixer.bias,
                  attention_type="block_sparse" if sparse else "original_full")
    if sparse:
        theirs.update(architectures=["BigBirdForMaskedLM"], block_size=mixer.block,
                      num_random_blocks=mixer.random_blocks)


BIG_BIRD = Family(
    "big_bird", "BigBirdForCausalLM",
    (*bert(1e-12, 2, "gelu_new"), Both(_read_bird, _write_bird),
     Key("max_position_embeddings", "max_length", 4096),
     Choice("hidden_act", "head_map", default="gelu_new"), Only("add_cross_attention", (False,)),
     Only("rescale_embeddings", (False,))),
    _top("bert"), _BLOCK, layer="bert.encoder.layer.{i}.", prefix="bert.",
    ignored=(*_POOLER, "cls.seq_relationship.weight", "cls.seq_relationship.bias"),
    harmless=frozenset({"position_embedding_type"}))

FAMILIES = [FNET, NYSTROMFORMER, LONGFORMER, BIG_BIRD]
