"""Our models against `transformers` with the same weights: `python -m benchmarks --only parity`.

For every family that can be imported a tiny random model of `transformers` is written, read by
manyform, compared, exported and read by `transformers` again.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import manyform
from manyform.exchange.families import FAMILIES

VOCAB, LENGTH = 64, 24


@dataclass(frozen=True)
class Case:
    """One oracle. config: fields of the tiny configuration of `model_type`. fault: what is wrong
    with the oracle in this version of transformers, in words. padded: left-padded rows are
    compared; tolerance: relative error allowed; attention: the oracle's implementation; call:
    further arguments of the oracle; rows: of the batch; length: of the rows; architecture: the
    oracle's class, where the family has another too; repair: done to the oracle, so that it
    computes what it means to."""

    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)
    fault: str = ""
    padded: bool = True
    tolerance: float = 1e-5
    attention: str = "eager"
    call: Callable[[], dict[str, Any]] = dict
    rows: int = 2
    length: int = LENGTH
    architecture: str = ""
    repair: Callable[[nn.Module], None] = lambda model: None


@dataclass(frozen=True)
class Result:
    """Largest error of the logits relative to the largest logit; None: not compared. exported: the
    family under which it was written again, with the same bits and logits."""

    case: Case
    prefill: float
    streaming: float
    padded: float | None
    exported: str
    same_bits: bool
    again: float


SMALL = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, intermediate_size=48, max_position_embeddings=64)


HEADS = {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}
FALCON = {k: v for k, v in HEADS.items() if k != "intermediate_size"}
GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=3, n_head=4, n_positions=64)
MPT = dict(vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4, max_seq_len=64)
MAMBA = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, state_size=8,
             time_step_rank=4)
MAMBA2 = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, state_size=8, num_heads=8,
              head_dim=8, n_groups=2, chunk_size=4)

RWKV = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, intermediate_size=48,
            context_length=64, rescale_every=0)
XLSTM = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, num_heads=4, qk_dim_factor=1.0,
             chunk_size=4, mode="inference", autocast_kernel_dtype="float32", step_kernel="native",
             chunkwise_kernel="chunkwise--native_autograd",
             sequence_kernel="native_sequence__native")
JAMBA = dict(num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8,
             mamba_dt_rank=4, use_mamba_kernels=False, pad_token_id=0)
FALCON_H1 = dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8,
                 mamba_n_groups=2, mamba_chunk_size=4, pad_token_id=0)
LATENT = dict(q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
              v_head_dim=10, num_key_value_heads=4)
DEEPSEEK = {**HEADS, **LATENT, "first_k_dense_replace": 3}

BIG_BIRD = dict(attention_type="block_sparse", block_size=5, num_random_blocks=1, sep_token_id=2)
REFORMER = dict(vocab_size=VOCAB, hidden_size=32, attention_head_size=8, num_attention_heads=4,
                feed_forward_size=48, attn_layers=["local", "lsh", "lsh"], is_decoder=True,
                local_attn_chunk_length=8, lsh_attn_chunk_length=8, num_hashes=2, num_buckets=4,
                hash_seed=5, axial_pos_shape=[8, 8], axial_pos_embds_dim=[12, 20],
                max_position_embeddings=64, bos_token_id=1)
REFORMER_FAULTS = ("it drops the head's bias, and tokens that see only themselves are off by 0.2% "
                   "(their scores are -1e5, in float32); compared with both repaired")
ZAMBA2 = dict(layers_block_type=["mamba", "hybrid", "hybrid"], n_mamba_heads=8, mamba_d_state=8,
              adapter_rank=4, chunk_size=4)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **more}}


def first_is_global() -> dict[str, Any]:
    """Longformer's mask of global tokens: the first of each row."""
    mask = torch.zeros(2, LENGTH, dtype=torch.int64)
    mask[:, 0] = 1
    return {"global_attention_mask": mask}


@torch.no_grad()
def without_reformer_faults(model: Any) -> None:
    """No bias at the head, which transformers 5 reads and does not add; and for a token's own key
    a score whose sums float32 can tell apart."""
    model.lm_head.bias.zero_()
    for module in model.modules():
        if hasattr(module, "self_mask_value_float32"):
            module.self_mask_value_float32.fill_(-100.0)


CASES = [
    Case("llama", "llama", SMALL),
    Case("llama, tied, biases", "llama", {**SMALL, "tie_word_embeddings": True, "head_dim": 16,
                                          "attention_bias": True, "mlp_bias": True}),
    Case("llama 3.1 positions", "llama", {**SMALL, **rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=32)}),
    Case("llama, interpolated", "llama", {**SMALL, **rope("linear", factor=4.0)}),
    Case("llama, dynamic", "llama", {**SMALL, **rope("dynamic", factor=4.0)}),
    Case("llama, yarn", "llama", {**SMALL, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=16)}),
    Case("llama, yarn with its options", "llama", {**SMALL, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=2048, beta_fast=16.0, beta_slow=2.0,
        attention_factor=1.3)}),
    Case("mistral, window", "mistral", {**SMALL, "sliding_window": 9, "head_dim": 16}),
    Case("mistral, no window", "mistral", {**SMALL, "sliding_window": None}),
    Case("qwen2", "qwen2", SMALL),
    Case("qwen2, windows above", "qwen2", {**SMALL, "use_sliding_window": True,
                                           "sliding_window": 7, "max_window_layers": 1}),
    Case("qwen3", "qwen3", {**SMALL, "head_dim": 16}),
    Case("gemma", "gemma", {**SMALL, "head_dim": 16}),
    Case("gemma2", "gemma2", {**SMALL, "head_dim": 16, "sliding_window": 7,
                              "query_pre_attn_scalar": 24, "attn_logit_softcapping": 3.0,
                              "final_logit_softcapping": 4.0}),
    Case("gemma3", "gemma3_text", {
        **SMALL, "head_dim": 16, "sliding_window": 7, "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}}),
    Case("olmo2", "olmo2", SMALL),
    Case("gpt2", "gpt2", GPT2),
    Case("gpt_neox", "gpt_neox", HEADS),
    Case("gpt_neox, in turn", "gpt_neox", {**HEADS, "use_parallel_residual": False,
                                           "attention_bias": False}),
    Case("phi", "phi", SMALL),
    Case("phi, normed heads", "phi", {**SMALL, "qk_layernorm": True}),
    Case("falcon 7B", "falcon", FALCON),
    Case("falcon 40B", "falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    Case("falcon 11B", "falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2,
                                  "num_ln_in_parallel_attn": 1}),
    Case("falcon RW (ALiBi)", "falcon", {**FALCON, "alibi": True, "bias": True,
                                         "parallel_attn": False, "multi_query": False},
         "its eager attention adds the bias twice; compared with its sdpa", attention="sdpa"),
    Case("mpt", "mpt", MPT),
    Case("mpt, clipped, six heads", "mpt", {**MPT, "d_model": 48, "n_heads": 6, "attn_config": {
        "clip_qkv": 0.5, "softmax_scale": 0.3}}),
    Case("mamba", "mamba", MAMBA),
    Case("mamba, biases", "mamba", {**MAMBA, "use_bias": True, "use_conv_bias": False,
                                    "tie_word_embeddings": False},
         "the bias of in_proj reaches the convolution from padding", padded=False),
    Case("falcon_mamba", "falcon_mamba", MAMBA),
    Case("mamba2", "mamba2", MAMBA2),
    Case("mamba2, bounded steps", "mamba2", {**MAMBA2, "time_step_limit": [0.3, 0.9],
                                             "use_bias": True, "use_conv_bias": False},
         "the bias of in_proj reaches the convolution from padding", padded=False),
    Case("rwkv", "rwkv", RWKV, "its attention mask is ignored", padded=False),
    Case("xlstm", "xlstm", XLSTM, "it takes no attention mask", padded=False),
    Case("recurrent_gemma", "recurrent_gemma", {
        **SMALL, "lru_width": 40, "attention_window_size": 7, "num_key_value_heads": 1,
        "pad_token_id": 0}, "padding reaches its convolution", padded=False),
    Case("jamba", "jamba", {**SMALL, **JAMBA}),
    Case("bamba", "bamba", {**SMALL, "attn_layer_indices": [1], "mamba_n_heads": 8,
                            "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2,
                            "mamba_chunk_size": 4, "pad_token_id": 0}),
    Case("falcon_h1", "falcon_h1", {**SMALL, **FALCON_H1}),
    Case("falcon_h1, multipliers and norm", "falcon_h1", {
        **SMALL, **FALCON_H1, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
        "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5, "key_multiplier": 0.4,
        "attention_in_multiplier": 1.5, "attention_out_multiplier": 0.7, "ssm_in_multiplier": 1.2,
        "ssm_out_multiplier": 0.6, "mlp_multipliers": [0.8, 1.3],
        "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9]}),
    Case("lfm2", "lfm2", {**SMALL, "layer_types": ["conv", "full_attention", "conv"],
                          "block_auto_adjust_ff_dim": False, "pad_token_id": 0}),
    Case("lfm2, rounded width", "lfm2", {**SMALL, "full_attn_idxs": [2], "conv_bias": True,
                                         "block_multiple_of": 8, "pad_token_id": 0},
         "the bias of in_proj reaches the convolution from padding", padded=False),
    Case("deepseek_v2", "deepseek_v2", {**DEEPSEEK, "head_dim": 4}),
    Case("deepseek_v2, full queries", "deepseek_v2", {
        **DEEPSEEK, "head_dim": 4, "q_lora_rank": None}),
    Case("deepseek_v3", "deepseek_v3", DEEPSEEK),
    Case("deepseek_v3, yarn", "deepseek_v3", {**DEEPSEEK, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=16, mscale=0.7,
        mscale_all_dim=0.7)}),
    Case("kimi_linear", "kimi_linear", {
        **HEADS, **LATENT, "q_lora_rank": None, "linear_head_dim": 8, "linear_num_heads": 4,
        "mlp_layer_types": ["dense"] * 3, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "layer_types": ["linear_attention", "full_attention",
                                           "linear_attention"]}),
    Case("qwen3_next", "qwen3_next", {
        **SMALL, "head_dim": 16, "layer_types": ["linear_attention", "full_attention",
                                                 "linear_attention"],
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 16, "num_experts": 0, "mlp_only_layers": [0, 1, 2]}),
    Case("minimax, one expert", "minimax", {
        **SMALL, "head_dim": 8, "num_local_experts": 1, "num_experts_per_tok": 1, "block_size": 4,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        **{f"{part}_alpha_factor": 6**0.25 for part in ("linear_attn", "full_attn", "mlp")}}),
    Case("zamba2", "zamba2", {**SMALL, **ZAMBA2}),
    Case("zamba2, two blocks in turn", "zamba2", {
        **SMALL, **ZAMBA2, "num_key_value_heads": 4, "num_hidden_layers": 7, "num_mem_blocks": 2,
        "use_shared_attention_adapter": True, "use_mem_rope": True, "mamba_ngroups": 2,
        "time_step_min": 0.7,
        "layers_block_type": ["hybrid", "hybrid", "mamba", "hybrid", "hybrid", "mamba", "hybrid"],
        "add_bias_linear": True},
         "the bias of in_proj reaches the convolution from padding", padded=False),
    Case("fnet", "fnet", {**{k: v for k, v in HEADS.items() if k != "num_attention_heads"},
                          "pad_token_id": 0}, padded=False),
    Case("nystromformer", "nystromformer", {
        **HEADS, "num_landmarks": 4, "segment_means_seq_len": LENGTH, "conv_kernel_size": 5},
         "its inverse depends on the other rows of a batch; one row compared", padded=False,
         rows=1),
    Case("longformer", "longformer", {**HEADS, "attention_window": [4, 6, 4], "pad_token_id": 0},
         padded=False, call=first_is_global),
    Case("big_bird, as a dense decoder", "big_bird", {
        **HEADS, "attention_type": "original_full", "is_decoder": True, "bos_token_id": 1,
        "sep_token_id": 2}),
    *(Case(f"big_bird, sparse, {n} tokens", "big_bird", {**HEADS, **BIG_BIRD},
           "it draws its random blocks in training only: in evaluation all are the first block",
           padded=False, length=n, architecture="BigBirdForMaskedLM") for n in (60, 58, 35)),
    *(Case(f"reformer, {name}", "reformer", {**REFORMER, **config}, REFORMER_FAULTS,
           padded=False, length=n, repair=without_reformer_faults) for name, n, config in (
        ("local and hashed", 48, {}), ("filled up", 43, {"num_hashes": 1}), ("short", 7, {}),
        ("buckets in factors, local blocks larger", 44, {
            "num_buckets": [2, 4], "lsh_attn_chunk_length": 4, "num_hashes": 3}),
        ("local only", 43, {"attn_layers": ["local"] * 2, "local_num_chunks_before": 2,
                            "axial_pos_embds": False}))),
]


def oracle(case: Case) -> nn.Module:
    """The random model of `transformers`: float32, eager attention, every parameter moved off its
    initial value, so that nothing is zero or one."""
    import transformers
    family = FAMILIES[case.model_type]
    config = transformers.AutoConfig.for_model(case.model_type, **case.config)
    config._attn_implementation = case.attention
    torch.manual_seed(0)
    model = getattr(transformers, case.architecture or family.architecture)(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            size = 0.1 if p.ndim < 2 else 0.3 * p.shape[-1] ** -0.5
            p.add_(torch.randn(p.shape, generator=generator) * size)
        case.repair(model)
    return model.eval().float()


def tokens(length: int = LENGTH) -> Tensor:
    """Two rows of random tokens."""
    return torch.randint(1, VOCAB, (2, length), generator=torch.Generator().manual_seed(2))


def relative(got: Tensor, want: Tensor) -> float:
    """The largest error relative to the largest logit."""
    return float((got - want).abs().max() / want.abs().max())


@torch.no_grad()
def compare(case: Case, folder: Path) -> Result:
    """Write the oracle below `folder`, read it, compare, export, read that, compare."""
    import transformers
    theirs, extra = oracle(case), case.call()
    theirs.save_pretrained(folder / "theirs")
    ours = manyform.load_pretrained(folder / "theirs")
    x = tokens(case.length)[:case.rows]
    if "MaskedLM" not in type(theirs).__name__:
        extra = {**extra, "use_cache": False}
    want = theirs(input_ids=x, **extra).logits
    got, _ = ours(x)
    streaming = None
    if ours.causal:
        state, pieces = None, []
        for t in range(case.length):
            logits, state = ours(x[:, t:t + 1], state)
            pieces.append(logits)
        streaming = relative(torch.cat(pieces, dim=1), want)
    padded = relative(*_padded(theirs, ours, x)) if case.padded else None
    kind = manyform.save_pretrained(ours, folder / "again", like=folder / "theirs",
                                    family=case.model_type)
    loader = (transformers.AutoModelForMaskedLM if "MaskedLM" in type(theirs).__name__ else
              transformers.AutoModelForCausalLM)
    back = loader.from_pretrained(folder / "again", attn_implementation=case.attention,
                                  dtype=torch.float32).eval()
    case.repair(back)
    again = back(input_ids=x, **extra).logits
    return Result(case, relative(got, want), streaming, padded, kind,
                  same_tensors(theirs, back), relative(again, want))


def _padded(theirs: nn.Module, ours: manyform.Model, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of a row that is short and padded on the left, theirs with a mask; ours as a document
    that begins with a reset behind the padding."""
    pad = 5
    row = x[:1].clone()
    row[:, :pad] = 0
    mask = torch.ones_like(row)
    mask[:, :pad] = 0
    extra = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if (
        "position_ids" in inspect.signature(theirs.forward).parameters) else {}
    want = theirs(input_ids=row, attention_mask=mask, use_cache=False, **extra).logits[:, pad:]
    reset = torch.zeros_like(row, dtype=torch.bool)
    reset[:, pad] = True
    got, _ = ours(row, reset=reset)
    return got[:, pad:], want


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Every parameter has the same bits, but for those of which no logit depends: a pooler's, and
    a router's over one expert."""
    a, b = dict(one.named_parameters()), dict(other.named_parameters())
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a
                                         if "pooler" not in k and "mlp.gate.weight" not in k)


def run(folder: Path) -> str:
    """Compare every case; write the results below `folder` and the table into
    docs/checkpoints.md; the table."""
    import json

    import transformers
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    lines = ["| checkpoint | prefill | token by token | left-padded | out and in again | "
             "transformers |", "|---|---|---|---|---|---|"]
    records = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as there:
            r = compare(case, Path(there))
        again = "same bits" if r.same_bits and r.again < case.tolerance else f"{r.again:.0e}"
        cells = [case.name, *("–" if v is None else f"{v:.0e}"
                              for v in (r.prefill, r.streaming, r.padded)), again,
                 case.fault or "right"]
        lines.append("| " + " | ".join(cells) + " |")
        records.append({"case": case.name, "model_type": case.model_type, "prefill": r.prefill,
                        "streaming": r.streaming, "padded": r.padded, "exported": r.exported,
                        "same_bits": r.same_bits, "again": r.again, "fault": case.fault})
        print(lines[-1], flush=True)
    versions = {"transformers": transformers.__version__, "torch": torch.__version__,
                "manyform": manyform.__version__}
    (folder / "results" / "parity.json").write_text(json.dumps(
        {"versions": versions, "cases": records}, indent=2) + "\n")
    table = "\n".join(lines) + "\n"
    note = (f"Measured with transformers {versions['transformers']} and torch {versions['torch']}, "
            "float32 on a CPU.\n")
    (folder / "results" / "parity.md").write_text(f"{table}\n{note}")
    page = folder.parent / "docs" / "checkpoints.md"
    before, _, rest = page.read_text().partition(MARK)
    after = rest.partition(MARK)[2]
    page.write_text(f"{before}{MARK}\n\n{table}\n{note}\n{MARK}{after}")
    return table


MARK = "<!-- parity: written by `python -m benchmarks --only parity` -->"
