"""The convolution of a stream: however it is cut it equals the whole, and it stays cheap."""

import sys
from itertools import pairwise

import pytest
import torch

from manyform import state as states
from manyform.errors import ManyformError
from manyform.ops import count, trace, use
from manyform.ops.long_conv import long_conv, long_conv_flops
from manyform.ops.online_conv import ConvState, online_conv

LENGTH, D = 700, 2
CUTS = {"whole": [LENGTH], "tokens": [1] * LENGTH, "prompt then tokens": [500] + [1] * 200,
        "mixed": [7, 100, 64, 64, 1, 1, 13, 250] + [1] * 150 + [50],
        "middling chunks": [70] * 10}


def run(x, k, reset, sizes):
    state, ys, at = None, [], 0
    for n in sizes:
        y, state = online_conv(x[:, at:at + n], k, state,
                               None if reset is None else reset[:, at:at + n])
        ys.append(y)
        at += n
    return torch.cat(ys, 1), state


@pytest.mark.parametrize("with_reset", [False, True])
@pytest.mark.parametrize("cuts", CUTS)
def test_any_cut_equals_the_whole(cuts, with_reset):
    torch.manual_seed(1)
    x = torch.randn(3, LENGTH, D, dtype=torch.float64)
    k = torch.randn(D, LENGTH, dtype=torch.float64)
    reset = None
    if with_reset:
        reset = torch.rand(3, LENGTH) < 0.004
        reset[:, 600] = reset[0, 613] = True
        reset[1, 1:600] = False
    with torch.no_grad(), use("reference"):
        want = long_conv(x, k, reset)
    with torch.no_grad(), trace() as seen:
        y, state = run(x, k, reset, CUTS[cuts])
    torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)
    assert cuts == "whole" or seen["online_conv", "tiles"]
    first = 600 if with_reset else 0
    torch.testing.assert_close(state.history, x[:, first:])


def test_rows_do_not_meet():
    """What one row holds, finite or not, is nothing to the others or to its next document."""
    torch.manual_seed(2)
    x, k = torch.randn(3, LENGTH, D), torch.randn(D, LENGTH)
    x[1, :300] = float("nan")
    reset = torch.zeros(3, LENGTH, dtype=torch.bool)
    reset[1, 300] = True
    with torch.no_grad():
        y, _ = run(x, k, reset, [1] * LENGTH)
        want = long_conv(x[[0, 2]], k)
        own = long_conv(x[1:2, 300:], k)
    torch.testing.assert_close(y[[0, 2]], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y[1:2, 300:], own, rtol=1e-4, atol=1e-4)


def test_gradients_through_the_state():
    torch.manual_seed(3)
    x = torch.randn(2, 200, D, dtype=torch.float64, requires_grad=True)
    k = torch.randn(D, 200, dtype=torch.float64, requires_grad=True)
    reset = torch.zeros(2, 200, dtype=torch.bool)
    reset[1, [40, 150]] = True
    w = torch.randn_like(x)
    grads = []
    for sizes in ([200], [3, 80, 1, 1, 65, 50]):
        y, state = run(x, k, reset, sizes)
        loss = (y * w).sum() + state.history.square().sum()
        grads.append(torch.autograd.grad(loss, [x, k]))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)


def test_a_state_is_a_value():
    torch.manual_seed(4)
    x, k = torch.randn(2, 400, D, dtype=torch.float64), torch.randn(D, 600, dtype=torch.float64)
    with torch.no_grad():
        _, state = run(x, k, None, [300] + [1] * 100)
        before = states.clone(state)
        branches = torch.randn(2, 2, 100, D, dtype=torch.float64)
        first = [run_from(state, branch, k) for branch in branches]
        again = [run_from(state, branch, k) for branch in branches]
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert states.equal(state, before)
        want = long_conv(torch.cat([x, branches[1]], 1), k)[:, 400:]
        torch.testing.assert_close(first[1], want)
        picked = run_from(states.select(state, [1, 0]), branches[1][[1, 0]], k)
        torch.testing.assert_close(picked, want[[1, 0]])


def run_from(state, x, k):
    ys = []
    for t in range(x.shape[1]):
        y, state = online_conv(x[:, t:t + 1], k, state)
        ys.append(y)
    return torch.cat(ys, 1)


def test_token_by_token_takes_t_log2_t(monkeypatch):
    """Points that pass through transforms, and products of the direct part, in a whole stream."""
    module = sys.modules["manyform.ops.online_conv"]
    work = {"points": 0}
    tile, direct = module._tile, module._direct

    def counted_tile(past, k, size):
        n = k.shape[1]
        work["points"] += 3 * n * n.bit_length()
        return tile(past, k, size)

    def counted_direct(window, k, n):
        work["points"] += window.shape[1] * n
        return direct(window, k, n)
    monkeypatch.setattr(module, "_tile", counted_tile)
    monkeypatch.setattr(module, "_direct", counted_direct)

    def total(length):
        work["points"] = 0
        x, k = torch.ones(1, length, 1), torch.ones(1, length)
        with torch.no_grad():
            run(x, k, None, [1] * length)
        return work["points"]
    totals = [total(n) for n in (1024, 2048, 4096)]
    for small, large in pairwise(totals):
        assert large < 2.9 * small  # T^2 would be 4, T log^2 T is about 2.4
    assert totals[-1] < 4096 ** 2 / 8


def test_operations_telescope_and_errors():
    x, k = torch.randn(1, 90, D), torch.randn(D, 90)
    with torch.no_grad(), count() as counter:
        run(x, k, None, [40] + [1] * 50)
    assert counter.total == long_conv_flops(1, 90, D)
    with pytest.raises(ManyformError, match="the filter must reach"):
        online_conv(x, k[:, :80])
    with pytest.raises(ManyformError, match="the state is for"):
        online_conv(x, k, ConvState(torch.zeros(2, 0, D), torch.zeros(2, dtype=torch.int64)))
