import json

import pytest
import torch

import manyform
from manyform import ManyformError
from manyform.training import checkpoint

FILES = ["config.json", "manifest.json", "model.safetensors", "tensors.safetensors", "values.json"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return manyform.create("llama", vocab_size=11, d_model=16, n_layers=1)


def state(step):
    return {"step": step, "none": None, "nested": {"w": torch.arange(3.0) + step, "list": [1, 2.5]},
            "carried": [None, [torch.ones(2, 2, dtype=torch.bfloat16)]], "word": "x"}


@pytest.fixture
def root(tmp_path, model):
    for step in (0, 5, 10):
        checkpoint.save(tmp_path, step, model, state(step), anchor=step == 5)
    return tmp_path


def newest(root, model, **options):
    said = []
    found = checkpoint.load_newest(root, model, said.append, **options)
    return (None if found is None else found["step"]), said


def test_round_trip(root, model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    loaded = checkpoint.load(root / "step-00000010", model)
    assert manyform.state.equal(loaded, state(10))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(manyform.load(root / "step-00000010").embedding.weight,
                       before["embedding.weight"])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_damage_is_named_and_the_one_before_is_used(root, model, name, damage):
    path = root / "step-00000010" / name
    content = path.read_bytes()
    if damage == "flip":
        middle = len(content) // 2
        flipped = bytes([content[middle] ^ 0x11])
        path.write_bytes(content[:middle] + flipped + content[middle + 1:])
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    step, said = newest(root, model)
    assert step == 5
    assert len(said) == 1
    assert "step-00000010" in said[0]
    assert name.removesuffix(".json") in said[0]
    assert not (root / "step-00000010").exists()
    assert newest(root, model) == (5, [])


def test_all_damaged(root, model):
    for folder in checkpoint.folders(root):
        (folder / "values.json").write_text("{}")
    step, said = newest(root, model)
    assert step is None
    assert len(said) == 3


def test_nothing_yet(tmp_path, model):
    assert newest(tmp_path / "none", model) == (None, [])


def test_half_written_folders_are_cleared(root, model):
    aside = root / ".writing-step-00000015"
    aside.mkdir()
    (aside / "model.safetensors").write_bytes(b"half")
    assert newest(root, model) == (10, [])
    assert not aside.exists()


def test_a_failed_write_leaves_no_checkpoint(root, model):
    class Broken(dict):
        def items(self):
            raise RuntimeError("disk full")
    with pytest.raises(RuntimeError, match="disk full"):
        checkpoint.save(root, 15, model, Broken(), anchor=False)
    assert newest(root, model) == (10, [])


def test_saving_a_step_again_replaces_it(root, model):
    checkpoint.save(root, 10, model, {**state(10), "word": "y"}, anchor=False)
    assert checkpoint.load(root / "step-00000010", model)["word"] == "y"
    assert [checkpoint.step_of(p) for p in checkpoint.folders(root)] == [10, 5, 0]


def test_rotation_keeps_the_newest_and_an_anchor(root, model):
    checkpoint.save(root, 15, model, state(15), anchor=False)
    checkpoint.rotate(root, 1)
    assert [checkpoint.step_of(p) for p in checkpoint.folders(root)] == [15, 5]
    assert newest(root, model, anchor=True) == (5, [])
    checkpoint.drop_after(root, 5)
    assert newest(root, model) == (5, [])


def test_another_model_is_refused(root):
    other = manyform.create("llama", vocab_size=11, d_model=32, n_layers=1)
    with pytest.raises(ManyformError, match="another model"):
        checkpoint.load(root / "step-00000010", other)


def test_manifest_lists_every_other_file(root):
    manifest = json.loads((root / "step-00000005" / "manifest.json").read_text())
    assert sorted(manifest["files"]) == [f for f in FILES if f != "manifest.json"]
    assert manifest["anchor"] is True
