"""Models made here, read by transformers."""

import json

import pytest
import torch

import manyform
from manyform.errors import ManyformError
from manyform.exchange.families import FAMILIES

hf = pytest.importorskip("transformers")
SIZES = {"vocab_size": 64, "d_model": 32, "n_layers": 2}


def model(name, **options):
    torch.manual_seed(0)
    made = manyform.create(name, **{**SIZES, **options})
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return made.eval()


def tokens(rows=2, length=12):
    return torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def read(folder, **options):
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@pytest.mark.parametrize(("name", "family"), [
    ("llama", "llama"), ("mistral", "mistral"), ("gpt2", "gpt2"), ("mamba", "mamba"),
    ("mamba2", "mamba2"), ("zamba2", "zamba2")])
@torch.no_grad()
def test_catalog_entries_have_a_native_class(name, family, tmp_path):
    ours = model(name, n_layers=12 if name == "zamba2" else 2)  # every sixth hears its block
    assert manyform.save_pretrained(ours, tmp_path / "out") == family
    theirs = read(tmp_path / "out")
    want, _ = ours(tokens())
    got = theirs(input_ids=tokens(), use_cache=False).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize(("preset", "family"), [
    ("gpt2-1.5b", "gpt2"), ("llama3-8b", "llama"), ("mistral-7b", "mistral"), ("gemma-7b", "gemma"),
    ("falcon-40b", "falcon"), ("mpt-7b", "mpt"), ("qwen3-8b", "qwen3"), ("mamba-2.8b", "mamba"),
    ("mamba2-2.7b", "mamba2"), ("rwkv4-7b", "rwkv"), ("recurrentgemma-2b", "recurrent_gemma")])
def test_published_sizes_are_what_their_family_says(preset, family):
    with torch.device("meta"):
        made = manyform.create(preset)
    config = FAMILIES[family].write_config(made)
    assert config["model_type"] == family
    assert FAMILIES[family].places(made)


@pytest.mark.parametrize("name", ["retnet", "lstm", "hyena", "3 gla : 1 attention", "alibi",
                                  "rwkv7", "reformer", "performer", "hymba"])
@torch.no_grad()
def test_others_take_a_class_of_ours_along(name, tmp_path):
    ours = model(name)
    assert manyform.save_pretrained(ours, tmp_path / "out") == "manyform"
    theirs = read(tmp_path / "out", trust_remote_code=True)
    x = tokens()
    want, _ = ours(x)
    assert torch.equal(theirs(input_ids=x).logits, want)
    again = theirs.generate(x[:1], max_new_tokens=5, do_sample=False, use_cache=False,
                            pad_token_id=0)
    assert again[0, 12:].tolist() == ours.generate(x[:1], 5, greedy=True).tokens[0].tolist()
    assert sum(p.numel() for p in theirs.parameters()) == ours.num_params()
    back = manyform.load_pretrained(tmp_path / "out")
    assert back.config == ours.config
    assert torch.equal(back(x)[0], want)


def test_a_damaged_export_of_our_class_is_named(tmp_path):
    manyform.save_pretrained(model("lstm"), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "manyform": {**values["manyform"], "n_layers": 3}}))
    with pytest.raises(ManyformError, match=r"lacks .*model.blocks.2"):
        manyform.load_pretrained(tmp_path / "out")
    path.write_text(json.dumps({k: v for k, v in values.items() if k != "manyform"}))
    with pytest.raises(ManyformError, match="needs its key 'manyform'"):
        manyform.load_pretrained(tmp_path / "out")


@torch.no_grad()
def test_padding_in_our_class_is_no_part_of_a_document(tmp_path):
    ours = model("gla")
    manyform.save_pretrained(ours, tmp_path / "out")
    theirs = read(tmp_path / "out", trust_remote_code=True)
    x, want = tokens(1), ours(tokens(1))[0]
    left = torch.nn.functional.pad(x, (3, 0))
    mask = (left != 0).long()
    assert torch.allclose(theirs(input_ids=left, attention_mask=mask).logits[:, 3:], want,
                          atol=1e-5)
    both = torch.nn.functional.pad(left, (0, 2))
    mask = (both != 0).long()
    assert torch.allclose(theirs(input_ids=both, attention_mask=mask).logits[:, 3:-2], want,
                          atol=1e-5)
    mask[0, 5] = 0
    with pytest.raises(ManyformError, match="not within"):
        theirs(input_ids=both, attention_mask=mask)


def test_loss_of_our_class_is_that_of_the_model(tmp_path):
    ours = model("linear_attention")
    manyform.save_pretrained(ours, tmp_path / "out")
    theirs = read(tmp_path / "out", trust_remote_code=True)
    x = tokens()
    want, _ = ours.loss(x[:, :-1], x[:, 1:])
    assert torch.allclose(theirs(input_ids=x, labels=x).loss, want, rtol=1e-5)


def test_a_family_that_does_not_fit_says_why(tmp_path):
    with pytest.raises(ManyformError, match="no llama: its setting position is"):
        manyform.save_pretrained(model("gpt2"), tmp_path / "out", family="llama")
    with pytest.raises(ManyformError, match="no mistral: its class of"):
        manyform.save_pretrained(model("llama", norm="layer"), tmp_path / "out", family="mistral")
    with pytest.raises(ManyformError, match="did you mean 'llama'"):
        manyform.save_pretrained(model("llama"), tmp_path / "out", family="lama")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [
    {"qk_norm": True}, {"window": 8, "sinks": 2}, {"rope_scaling": {"type": "ntk", "factor": 2.0}},
    {"residual": "deepnorm"}, {"logit_cap": 5.0}, {"norm": "layer_no_bias"}, {"exits": (1,)},
    {"prefix_tokens": 3}])
def test_no_option_is_lost_on_the_way_out(options, tmp_path):
    ours = model("llama", **options)
    manyform.save_pretrained(ours, tmp_path / "out")
    back = manyform.load_pretrained(tmp_path / "out")
    assert torch.allclose(back(tokens())[0], ours(tokens())[0], atol=1e-6)


def test_what_looks_ahead_has_no_class_of_ours(tmp_path):
    with pytest.raises(ManyformError, match="only causal models"):
        manyform.save_pretrained(model("fnet"), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_shards_and_their_index(tmp_path):
    ours = model("llama")
    manyform.save_pretrained(ours, tmp_path / "out", max_shard_size="20KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 4 * ours.num_params()
    back = manyform.load_pretrained(tmp_path / "out")
    for a, b in zip(ours.parameters(), back.parameters(), strict=True):
        assert torch.equal(a, b)
    read(tmp_path / "out")
    with pytest.raises(ManyformError, match="already holds weights"):
        manyform.save_pretrained(ours, tmp_path / "out")
    with pytest.raises(ManyformError, match="a size reads like"):
        manyform.save_pretrained(ours, tmp_path / "other", max_shard_size="big")


def test_bfloat16_files_keep_their_bits(tmp_path):
    ours = model("llama")
    manyform.save_pretrained(ours, tmp_path / "out", dtype="bfloat16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    stored = manyform.load_pretrained(tmp_path / "out", dtype="stored")
    wide = manyform.load_pretrained(tmp_path / "out")
    for a, b, c in zip(ours.parameters(), stored.parameters(), wide.parameters(), strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(a.to(torch.bfloat16), b)
        assert torch.equal(b.float(), c)
    manyform.save_pretrained(stored, tmp_path / "again")
    assert torch.equal(manyform.load_pretrained(tmp_path / "again")(tokens())[0],
                       wide(tokens())[0])
