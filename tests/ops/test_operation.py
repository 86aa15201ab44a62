"""Operations: which form runs, how it is chosen, what is counted."""

import pytest
import torch

from manyform import ManyformError
from manyform.ops import count, trace, use
from manyform.ops.operation import operation


@operation(flops=lambda x, w: 7 * x.numel())
def sample_operation(x, w):
    """x w, twice."""
    return 2 * (x @ w)


@sample_operation.path("small", when=lambda x, w: x.shape[0] <= 2)
def _(x, w):
    return x @ w + x @ w


@sample_operation.path("single", when=lambda x, w: x.shape[0] == 1)
def _(x, w):
    return (2 * x) @ w


W = torch.randn(3, 3)


@pytest.mark.parametrize(("rows", "path"), [(1, "single"), (2, "small"), (3, "reference")])
def test_the_last_registered_form_that_applies_is_taken(rows, path):
    with trace() as seen:
        sample_operation(torch.ones(rows, 3), W)
    assert dict(seen) == {("sample_operation", path): 1}
    assert sample_operation.paths == ["single", "small", "reference"]


def test_a_form_can_be_chosen_and_refused():
    with use("reference"), trace() as seen:
        sample_operation(torch.ones(1, 3), W)
        with use(sample_operation="small"):
            sample_operation(torch.ones(1, 3), W)
            with pytest.raises(ManyformError, match="does not apply"):
                sample_operation(torch.ones(5, 3), W)
    assert dict(seen) == {("sample_operation", "reference"): 1, ("sample_operation", "small"): 1}
    with use(sample_operation="smal"), pytest.raises(ManyformError, match="did you mean 'small'"):
        sample_operation(torch.ones(1, 3), W)
    with pytest.raises(ManyformError, match="unknown operation"), use(sampl_operation="small"):
        pass


def test_counting_takes_the_declared_operations_and_pauses_inside():
    x = torch.ones(4, 3)
    with count() as outer:
        x @ W
        with count() as inner:
            sample_operation(x, W)
        x @ W
    assert outer.by_name == {"mm": 2 * 2 * 4 * 3 * 3, "sample_operation": 7 * 12}
    assert inner.total == 7 * 12


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="exists already"):
        operation(flops=lambda: 0)(sample_operation.reference)
