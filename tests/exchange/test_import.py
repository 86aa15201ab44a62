"""What is wrong with a checkpoint is said in one sentence that names it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import manyform
from manyform.errors import ManyformError
from manyform.exchange.families import FAMILIES
from manyform.model import Model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "llama"
    torch.manual_seed(0)
    model = manyform.create("llama", vocab_size=64, d_model=32, n_layers=2, tie=False)
    manyform.save_pretrained(model, path)
    return path


@pytest.fixture
def copy(good, tmp_path):
    return shutil.copytree(good, tmp_path / "copy")


def change_config(folder, remove=(), **values):
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def refused(folder, match):
    with pytest.raises(ManyformError, match=match) as caught:
        manyform.load_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_reads_what_was_written(good):
    assert manyform.load_pretrained(good).config.name == "llama"


def test_a_missing_tensor_is_named(copy):
    change_weights(copy, lambda w: w.pop("model.layers.1.self_attn.k_proj.weight"))
    refused(copy, r"lacks model\.layers\.1\.self_attn\.k_proj\.weight")


def test_a_surplus_tensor_is_named(copy):
    change_weights(copy, lambda w: w.update({"score.weight": torch.zeros(2, 2)}))
    refused(copy, r"does not have: score\.weight")


def test_a_misshapen_tensor_is_named(copy):
    change_weights(copy, lambda w: w.update({"model.norm.weight": torch.zeros(31)}))
    refused(copy, r"model\.norm\.weight is \(31,\), not \(32,\)")


def test_computed_tensors_of_old_files_are_no_surplus(copy):
    change_weights(copy, lambda w: w.update(
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}))
    manyform.load_pretrained(copy)


def test_a_tied_head_may_be_written_twice_but_not_differ(copy):
    change_weights(copy, lambda w: w.update(
        {"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    change_config(copy, tie_word_embeddings=True)
    assert manyform.load_pretrained(copy).config.tie
    change_weights(copy, lambda w: w["lm_head.weight"].add_(1))
    refused(copy, r"ties lm_head\.weight to model\.embed_tokens\.weight")


def test_a_checkpoint_of_the_bare_model_has_no_prefix(copy):
    def strip(weights):
        weights.pop("lm_head.weight")
        for name in list(weights):
            weights[name.removeprefix("model.")] = weights.pop(name)
    change_weights(copy, strip)
    change_config(copy, tie_word_embeddings=True)
    manyform.load_pretrained(copy)


def test_a_pickle_is_refused_with_the_reason(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, "pytorch_model.bin.*a pickle can run any code")


def test_no_weights_at_all(copy):
    (copy / "model.safetensors").unlink()
    refused(copy, "holds no weights")


@pytest.mark.parametrize("keep", [0, 5, 100, -50])
def test_a_truncated_file(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(copy, "not a whole safetensors file")


def test_an_index_that_names_a_missing_file(copy):
    (copy / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    refused(copy, "model-00001-of-00002.safetensors, which is missing")


def test_an_index_that_leaves_the_folder(copy):
    (copy / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"a": "../model.safetensors"}}))
    refused(copy, "no weight_map")


def test_an_index_that_says_what_is_not_so(copy):
    (copy / "model.safetensors.index.json").write_text(json.dumps(
        {"weight_map": {"a": "model.safetensors"}}))
    refused(copy, "holds 'a', which it does not")


def test_an_unknown_family_gets_the_list(copy):
    change_config(copy, model_type="frobnicate")
    refused(copy, "'frobnicate' cannot be read; known: llama, mistral")


def test_a_folder_without_config(copy, tmp_path):
    (copy / "config.json").write_text("{not json")
    refused(copy, "config.json cannot be read")
    (copy / "config.json").unlink()
    refused(copy, "config.json is missing")
    refused(tmp_path / "nowhere", "there is no folder")


def test_a_folder_of_ours_is_pointed_to_load(tmp_path):
    manyform.create("gru", vocab_size=8, d_model=8, n_layers=1).save(tmp_path)
    refused(tmp_path, r"manyform\.load")


@pytest.mark.parametrize(("values", "match"), [
    ({"hidden_act": "quick_gelu"}, "hidden_act='quick_gelu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"attention_sink_tokens": 4}, "attention_sink_tokens=4"),
    ({"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "'longrope'"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 0.7}}, "mscale=0.7"),
    ({"hidden_size": None}, "lacks 'hidden_size'"),
    ({"num_key_value_heads": 3}, "kv_heads must divide")])
def test_a_setting_without_an_equal_is_refused_by_name(copy, values, match):
    change_config(copy, **values)
    refused(copy, match)


def test_switched_off_features_of_a_file_are_read(copy):
    change_config(copy, some_new_feature=None, another=False)
    manyform.load_pretrained(copy)


def test_old_names_of_rotary_settings(copy):
    change_config(copy, remove=("rope_parameters",), rope_theta=500000.0,
                  rope_scaling={"type": "linear", "factor": 2})
    mixer = manyform.load_pretrained(copy).blocks[0].mixer
    assert mixer.rope_base == 500000.0
    assert mixer.rope_scaling == {"type": "linear", "factor": 2.0}


def test_dynamic_positions_are_exact_as_far_as_trained_and_refused_beyond(copy):
    change_config(copy, remove=("rope_scaling",), max_position_embeddings=8,
                  rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    model = manyform.load_pretrained(copy)
    _, state = model(torch.zeros(1, 8, dtype=torch.int64))
    with pytest.raises(ManyformError, match="position 8 lies past the 8"):
        model(torch.zeros(1, 1, dtype=torch.int64), state)


def test_a_use_of_a_shared_block_is_named_in_full(tmp_path):
    torch.manual_seed(0)
    model = manyform.create("mamba2 + none : zamba2 + none @ one", vocab_size=16, d_model=16,
                            n_layers=4, norm_eps=1e-5, d_state=8, rank=2)
    assert manyform.save_pretrained(model, tmp_path / "out") == "zamba2"
    manyform.load_pretrained(tmp_path / "out")
    name = "model.layers.1.shared_transformer.self_attn.linear_q_adapter_list.1.0.weight"
    change_weights(tmp_path / "out", lambda w: w.pop(name))
    refused(tmp_path / "out", "lacks " + name.replace(".", r"\."))
    manyform.save_pretrained(model, tmp_path / "twice")
    copy = "model.layers.3.shared_transformer.input_layernorm.weight"
    change_weights(tmp_path / "twice", lambda w: w.update({copy: torch.ones(32)}))
    manyform.load_pretrained(tmp_path / "twice")
    change_weights(tmp_path / "twice", lambda w: w.update({copy: torch.zeros(32)}))
    refused(tmp_path / "twice", r"ties model\.layers\.3\.shared_transformer\.input_layernorm")
    change_config(tmp_path / "out", layers_block_type=["mamba", "mystery", "mamba", "hybrid"])
    refused(tmp_path / "out", "must list 4 layers as layers_block_type")


REFORMER = {"vocab_size": 16, "hidden_size": 16, "feed_forward_size": 24, "is_decoder": True,
            "attn_layers": ["local", "lsh"], "num_attention_heads": 2, "attention_head_size": 8,
            "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": [2, 4],
            "axial_pos_shape": [4, 8], "axial_pos_embds_dim": [4, 12],
            "max_position_embeddings": 32}


@pytest.fixture
def reformer(tmp_path):
    torch.manual_seed(0)
    model = Model(FAMILIES["reformer"].read_config(REFORMER)).eval()
    assert manyform.save_pretrained(model, tmp_path / "reformer") == "reformer"
    return tmp_path / "reformer"


def test_rotations_that_were_drawn_at_every_call_are_drawn_once(reformer):
    assert json.loads((reformer / "config.json").read_text())["hash_seed"] == 0
    tokens = torch.randint(16, (1, 23))
    one, other = (manyform.load_pretrained(reformer) for _ in range(2))
    assert torch.equal(one(tokens)[0], other(tokens)[0])
    with pytest.raises(ManyformError, match="looks ahead and cannot continue"):
        one(tokens, one.blocks.initial_state(1))


@pytest.mark.parametrize(("values", "match"), [
    ({"num_buckets": None}, "leaves num_buckets to the length"),
    ({"lsh_attn_chunk_length": 6}, "chunks of 6 and blocks of 4"),
    ({"attn_layers": ["local", "global"]}, "each 'lsh' or 'local'"),
    ({"is_decoder": False}, "is_decoder=False"),
    ({"lsh_num_chunks_before": 2}, "lsh_num_chunks_before=2"),
    ({"axial_pos_embds_dim": [4, 4]}, "add up to d_model=16"),
    ({"axial_pos_shape": [4, 16]}, r"weights\.1 is \(1, 8, 12\), not \(1, 16, 12\)")])
def test_a_reformer_that_has_no_equal_is_refused(reformer, values, match):
    change_config(reformer, **values)
    refused(reformer, match)


@pytest.mark.parametrize(("values", "match"), [
    ({"is_decoder": False, "attention_type": "original_full"}, "original_full' of an encoder"),
    ({"is_decoder": True, "attention_type": "block_sparse"}, "block_sparse' of a decoder")])
def test_a_bigbird_that_has_no_equal_is_refused(values, match):
    with pytest.raises(ManyformError, match=match):
        FAMILIES["big_bird"].read_config({
            "vocab_size": 16, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
            "intermediate_size": 24, **values})
