"""States are values: trees of tensors and the plain functions on them."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from manyform import ManyformError, state


class Pair(NamedTuple):
    a: torch.Tensor
    b: object


trees = st.recursive(
    st.one_of(st.just(None), st.builds(lambda n: torch.randn(3, n), st.integers(0, 4)),
              st.builds(lambda n: torch.randint(0, 9, (3, n)), st.integers(0, 4))),
    lambda inner: st.one_of(st.lists(inner, max_size=3),
                            st.tuples(inner, inner),
                            st.builds(Pair, st.just(torch.ones(3)), inner),
                            st.dictionaries(st.sampled_from("xyz"), inner, max_size=3)),
    max_leaves=6)


@given(trees)
def test_save_and_load_give_the_same_bits(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("s") / "state.safetensors"
    state.save(tree, path)
    back = state.load(path, like=state.map_tensors(torch.zeros_like, tree))
    assert state.equal(tree, back)


@given(trees)
def test_rows_can_be_taken_apart_and_joined(tree):
    parts = [state.select(tree, [i]) for i in range(3)]
    assert state.equal(state.join(parts), tree)
    picked = state.select(tree, torch.tensor([True, False, True]))
    assert state.equal(picked, state.join([parts[0], parts[2]]))


@given(trees)
def test_clone_shares_nothing_and_casts_keep_integers(tree):
    copy = state.clone(tree)
    for t in state.tensors(copy):
        t.zero_()
    assert state.nbytes(tree) == sum(t.numel() * t.element_size() for t in state.tensors(tree))
    cast = state.to(tree, dtype=torch.float64)
    for before, after in zip(state.tensors(tree), state.tensors(cast), strict=True):
        assert after.dtype == (torch.float64 if before.is_floating_point() else before.dtype)


def test_equal_sees_structure_dtype_bits_and_nan():
    nan = torch.tensor([[float("nan"), 1.0]])
    assert state.equal(nan, nan.clone())
    assert not state.equal(nan, torch.tensor([[0.0, 1.0]]))
    assert not state.equal((nan,), [nan, nan])
    assert not state.equal(nan, nan.double())


def test_errors_say_what_is_wrong(tmp_path):
    with pytest.raises(ManyformError, match="no batch size"):
        state.batch_size((None, []))
    assert state.batch_size((None, torch.ones(5, 2))) == 5
    with pytest.raises(ManyformError, match="cannot read a state"):
        state.load(tmp_path / "missing", like=None)
    state.save((torch.ones(1),), tmp_path / "s")
    with pytest.raises(ManyformError, match="belongs to another model"):
        state.load(tmp_path / "s", like=(torch.ones(1), torch.ones(1)))
    (tmp_path / "s").write_bytes((tmp_path / "s").read_bytes()[:20])
    with pytest.raises(ManyformError, match="cannot read a state"):
        state.load(tmp_path / "s", like=(torch.ones(1),))
    with pytest.raises(ManyformError, match="different structure"):
        state.map_tensors(torch.add, [torch.ones(1)], [])
