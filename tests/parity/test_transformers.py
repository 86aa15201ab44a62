"""Logits equal those of `transformers`, an independent implementation, with the same weights.

Each oracle is a tiny random model made here; whole prompts and token by token.
"""

import pytest
import torch

import manyform

hf = pytest.importorskip("transformers")
VOCAB, D, LAYERS, T = 61, 64, 3, 37


def randomised(model):
    """Every weight moved off its initial value, so that nothing is zero or one."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (0.1 if p.ndim < 2 else 0.2 *
                                                                p.shape[-1] ** -0.5))
    return model.eval()


def copy(ours, theirs, names):
    """Fill our weights from theirs. names: {our name: their name or a function of their dict}."""
    source = theirs.state_dict()
    own = dict(ours.named_parameters())
    assert set(names) == set(own), set(names) ^ set(own)
    with torch.no_grad():
        for name, where in names.items():
            value = source[where] if isinstance(where, str) else where(source)
            assert own[name].shape == value.shape, (name, own[name].shape, value.shape)
            own[name].copy_(value)
    return ours.eval()


def joined(*names, dim=0):
    return lambda source: torch.cat([source[n] for n in names], dim=dim)


def turned(name):
    return lambda source: source[name].T


@torch.no_grad()
def agree(ours, theirs, tolerance=2e-5):
    torch.manual_seed(0)
    tokens = torch.randint(0, VOCAB, (2, T))
    want = theirs(input_ids=tokens).logits
    got, _ = ours(tokens)
    scale = want.abs().max()
    assert (got - want).abs().max() < tolerance * scale
    state, pieces = None, []
    for t in range(T):
        logits, state = ours(tokens[:, t:t + 1], state)
        pieces.append(logits)
    assert (torch.cat(pieces, 1) - want).abs().max() < tolerance * scale


def attention_names(i, head=True):
    b, t = f"blocks.{i}", f"model.layers.{i}"
    return {
        f"{b}.mixer_norm.weight": f"{t}.input_layernorm.weight",
        f"{b}.channel_norm.weight": f"{t}.post_attention_layernorm.weight",
        f"{b}.mixer.qkv.weight": joined(*(f"{t}.self_attn.{p}_proj.weight" for p in "qkv")),
        f"{b}.mixer.out.weight": f"{t}.self_attn.o_proj.weight",
        f"{b}.channel.gate_up.weight": joined(f"{t}.mlp.gate_proj.weight",
                                              f"{t}.mlp.up_proj.weight"),
        f"{b}.channel.down.weight": f"{t}.mlp.down_proj.weight"}


LLAMA = {"vocab_size": VOCAB, "hidden_size": D, "num_hidden_layers": LAYERS,
         "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 176,
         "rms_norm_eps": 1e-6, "attn_implementation": "eager"}


def llama_names():
    names = {"embedding.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight",
             "final_norm.weight": "model.norm.weight"}
    for i in range(LAYERS):
        names.update(attention_names(i))
    return names


def ours_like_llama(**options):
    return manyform.create("llama", vocab_size=VOCAB, d_model=D, n_layers=LAYERS, head_dim=16,
                           kv_heads=2, tie=False, **options)


@pytest.mark.parametrize(("theirs", "ours"), [
    ({}, {}),
    ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
     {"type": "yarn", "factor": 4.0, "original_length": 16}),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
     {"type": "yarn", "factor": 4.0, "original_length": 2048}),
], ids=["rotary", "position interpolation", "yarn from 16", "yarn from 2048"])
def test_llama(theirs, ours):
    rope = {"rope_theta": 10000.0, "rope_type": "default", **theirs}
    config = hf.LlamaConfig(**LLAMA, rope_parameters=rope,
                            max_position_embeddings=8192)
    oracle = randomised(hf.LlamaForCausalLM(config))
    model = ours_like_llama(**({"rope_scaling": ours} if ours else {}))
    agree(copy(model, oracle, llama_names()), oracle)


def test_mistral_with_a_window():
    config = hf.MistralConfig(**LLAMA, sliding_window=9, head_dim=16)
    oracle = randomised(hf.MistralForCausalLM(config))
    agree(copy(ours_like_llama(window=9), oracle, llama_names()), oracle)


def test_gpt2():
    config = hf.GPT2Config(vocab_size=VOCAB, n_embd=D, n_layer=LAYERS, n_head=4, n_positions=64,
                           attn_implementation="eager")
    oracle = randomised(hf.GPT2LMHeadModel(config))
    names = {"embedding.weight": "transformer.wte.weight",
             "positions.weight": "transformer.wpe.weight",
             "final_norm.weight": "transformer.ln_f.weight",
             "final_norm.bias": "transformer.ln_f.bias"}
    for i in range(LAYERS):
        b, t = f"blocks.{i}", f"transformer.h.{i}"
        for norm, ln in (("mixer_norm", "ln_1"), ("channel_norm", "ln_2")):
            for part in ("weight", "bias"):
                names[f"{b}.{norm}.{part}"] = f"{t}.{ln}.{part}"
        for layer, conv in (("mixer.qkv", "attn.c_attn"), ("mixer.out", "attn.c_proj"),
                            ("channel.up", "mlp.c_fc"), ("channel.down", "mlp.c_proj")):
            names[f"{b}.{layer}.weight"] = turned(f"{t}.{conv}.weight")
            names[f"{b}.{layer}.bias"] = f"{t}.{conv}.bias"
    model = manyform.create("gpt2", vocab_size=VOCAB, d_model=D, n_layers=LAYERS, head_dim=16,
                            max_length=64)
    agree(copy(model, oracle, names), oracle)


def test_mamba():
    config = hf.MambaConfig(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS,
                            layer_norm_epsilon=1e-6, use_cache=False)
    oracle = randomised(hf.MambaForCausalLM(config))
    names = {"embedding.weight": "backbone.embeddings.weight",
             "final_norm.weight": "backbone.norm_f.weight"}
    for i in range(LAYERS):
        b, t = f"blocks.{i}.mixer", f"backbone.layers.{i}.mixer"
        names[f"blocks.{i}.mixer_norm.weight"] = f"backbone.layers.{i}.norm.weight"
        names.update({f"{b}.{n}.weight": f"{t}.{n}.weight" for n in
                      ("in_proj", "x_proj", "dt_proj", "out_proj")})
        names.update({f"{b}.A_log": f"{t}.A_log", f"{b}.D": f"{t}.D",
                      f"{b}.dt_bias": f"{t}.dt_proj.bias", f"{b}.conv_bias": f"{t}.conv1d.bias",
                      f"{b}.conv_weight": lambda s, t=t: s[f"{t}.conv1d.weight"][:, 0]})
    model = manyform.create("mamba", vocab_size=VOCAB, d_model=D, n_layers=LAYERS)
    agree(copy(model, oracle, names), oracle)


def test_mamba2():
    config = hf.Mamba2Config(vocab_size=VOCAB, hidden_size=D, num_hidden_layers=LAYERS,
                             num_heads=8, head_dim=16, state_size=16, n_groups=2, chunk_size=8,
                             layer_norm_epsilon=1e-5, use_cache=False, tie_word_embeddings=True)
    oracle = randomised(hf.Mamba2ForCausalLM(config))
    names = {"embedding.weight": "backbone.embeddings.weight",
             "final_norm.weight": "backbone.norm_f.weight"}
    for i in range(LAYERS):
        b, t = f"blocks.{i}.mixer", f"backbone.layers.{i}.mixer"
        names[f"blocks.{i}.mixer_norm.weight"] = f"backbone.layers.{i}.norm.weight"
        names.update({f"{b}.in_proj.weight": f"{t}.in_proj.weight",
                      f"{b}.out_proj.weight": f"{t}.out_proj.weight",
                      f"{b}.norm_weight": f"{t}.norm.weight", f"{b}.conv_bias": f"{t}.conv1d.bias",
                      f"{b}.conv_weight": lambda s, t=t: s[f"{t}.conv1d.weight"][:, 0]})
        names.update({f"{b}.{n}": f"{t}.{n}" for n in ("A_log", "D", "dt_bias")})
    model = manyform.create("mamba2", vocab_size=VOCAB, d_model=D, n_layers=LAYERS, norm_eps=1e-5,
                            d_state=16, head_dim=16, n_groups=2)
    agree(copy(model, oracle, names), oracle)
