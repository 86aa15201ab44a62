"""The compiled stack machine against the reference, forward and gradient."""

import pytest
import torch

from manyform.ops.operation import use
from manyform.ops.shift_reduce import shift_reduce


def case(batch, length, d, slots, scored, marked, seed):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=g) * scale).requires_grad_()
    leaf, stack = normal(batch, length, 2 * d), normal(batch, slots, 2 * d)
    weight, bias = normal(5 * d, 2 * d, scale=(2 * d)**-0.5), normal(5 * d)
    depth = torch.randint(0, slots + 3, (batch,), generator=g)
    decide = [torch.rand(batch, length, generator=g) < p for p in (0.5, 0.45, 0.1)]
    score = (normal(2, 2 * d, scale=3 * (2 * d)**-0.5), normal(2)) if scored else None
    return (leaf, weight, bias, stack, depth, None if scored else tuple(decide[:2]), score,
            decide[2] if marked else None)


def values_and_gradients(path, args):
    wanted = [x for x in (*args[:4], *(args[6] or ()))]
    g = torch.Generator().manual_seed(1)
    with use(shift_reduce=path):
        y, stack, depth = shift_reduce(*args)
    grads = torch.autograd.grad([y, stack], wanted, [
        torch.randn(x.shape, generator=g) for x in (y, stack)])
    return [y, stack, *grads], depth


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize(("batch", "length", "d", "slots", "marked"), [
    (1, 1, 16, 8, False), (3, 20, 16, 4, False), (5, 30, 24, 3, True), (9, 33, 6, 2, True),
    (2, 40, 70, 5, True)])
def test_compiled(batch, length, d, slots, marked, scored):
    for seed in range(3):
        args = case(batch, length, d, slots, scored, marked, seed)
        want, depth = values_and_gradients("reference", args)
        got, found = values_and_gradients("numba", args)
        assert torch.equal(depth, found)
        for a, b in zip(want, got, strict=True):
            assert (a - b).abs().max() <= 3e-6 * (1 + a.abs().max())
        with torch.no_grad(), use(shift_reduce="numba"):  # leaves out what nobody reads
            y, stack, found = shift_reduce(*args)
        assert torch.equal(depth, found)
        torch.testing.assert_close(y, got[0])
        torch.testing.assert_close(stack, got[1])


def test_the_stack_of_the_caller_stays_as_it_was():
    args = case(2, 9, 16, 4, True, False, 0)
    stack, depth = args[3].detach().clone(), args[4].clone()
    shift_reduce(*args)
    assert torch.equal(args[3], stack)
    assert torch.equal(args[4], depth)
