"""The long convolution of a stream: exact, and T log^2 T in all however the stream is cut."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyform.errors import ManyformError
from manyform.ops.append import append
from manyform.ops.long_conv import SHORT, fast_size, long_conv, long_conv_flops
from manyform.ops.operation import operation

RATIO = 8
"""Each level of tiles is this much longer than the one below; the lowest is SHORT tokens."""


class _Fields(NamedTuple):
    history: Tensor
    start: Tensor


class ConvState(_Fields):
    """What a convolution of a stream must remember.

    history: (B, P, D), every input since the oldest document that a row is still in.
    start: (B,) int64, where in the history each row's document begins.

    Beside these fields it may carry `tiles`, what part of the history adds to outputs that are
    still to come. They follow from the history, and are worked out anew (in O(P log P)) where a
    state was selected, moved or loaded; they take at most about as many bytes as the history.
    """

    tiles: dict[int, tuple[int, Tensor]]

    def __new__(cls, history: Tensor, start: Tensor) -> ConvState:
        self = super().__new__(cls, history, start)
        self.tiles = {}
        return self


def _flops(x: Tensor, k: Tensor, state: ConvState | None = None,
           reset: Tensor | None = None) -> int:
    batch, length, channels = x.shape
    before = 0 if state is None else state.history.shape[1]
    return (long_conv_flops(batch, before + length, channels)
            - (long_conv_flops(batch, before, channels) if before else 0))


@operation(flops=_flops)
def online_conv(x: Tensor, k: Tensor, state: ConvState | None = None, reset: Tensor | None = None,
                ) -> tuple[Tensor, ConvState]:
    """y_t = sum_{s <= t} k_{t-s} x_s over the whole stream, s not before the document of t begins.

    x: (B, T, D), the next inputs; k: (D, L) with L at least the state's history and T together;
    reset: (B, T) bool, true where a document begins. Returns y: (B, T, D) in the dtype of x, and
    the state, whose history is in float32 (float64 for float64 input).
    Operations are counted as what the stream adds to those of one `long_conv`.
    Raises ManyformError if the filter is too short.
    """
    whole, marks, old = _whole(x, k, state, reset)
    y = long_conv.reference(whole, k[:, :whole.shape[1]], marks)[:, old:]
    return y.to(x.dtype), _after(whole, state, marks, x, reset)


@online_conv.path("fft")
def _at_once(x: Tensor, k: Tensor, state: ConvState | None = None, reset: Tensor | None = None,
             ) -> tuple[Tensor, ConvState]:
    """One long convolution over history and new inputs: O((P + T) log (P + T)), differentiable."""
    whole, marks, old = _whole(x, k, state, reset)
    y = long_conv(whole, k[:, :whole.shape[1]], marks)[:, old:]
    return y.to(x.dtype), _after(whole, state, marks, x, reset)


def _small_step(x: Tensor, k: Tensor, state: ConvState | None = None,
                reset: Tensor | None = None) -> bool:
    """Nothing records gradients, and the new inputs are few beside the history."""
    if state is None or 8 * x.shape[1] > state.history.shape[1] + x.shape[1]:
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in (x, k, state.history)))


@online_conv.path("tiles", when=_small_step)
def _relaxed(x: Tensor, k: Tensor, state: ConvState, reset: Tensor | None = None,
             ) -> tuple[Tensor, ConvState]:
    """Relaxed multiplication (Fischer & Stockmeyer 1974; Oncescu 2024, "Flash Inference").

    Lags and times are cut into tiles. Of level j, with S = SHORT RATIO^j: at every time i that is
    a multiple of S but not of RATIO S, one transform adds the inputs since the last multiple of
    RATIO S to the next S outputs. The inputs since the last multiple of SHORT meet the
    output directly. Every pair of times is covered once; a token costs O(log^2 T) on average.
    """
    _check(k, state.history.shape[1] + x.shape[1])
    wide, old, length = state.history.dtype, state.history.shape[1], x.shape[1]
    history = append(state.history, x.to(wide), 1)
    start, tiles, ys = state.start, dict(state.tiles), []
    marks = {} if reset is None else {
        t: reset[:, t] for t in reset.any(0).nonzero().flatten().tolist()}
    blocks = range((old // SHORT + 1) * SHORT, old + length, SHORT)
    edges = sorted({old, *blocks, *(old + t for t in marks)})
    for i, end in zip(edges, [*edges[1:], old + length], strict=True):
        if i - old in marks:
            start = torch.where(marks[i - old], i, start)
        masked = bool((start > 0).any())
        base = i // SHORT * SHORT
        window = _since(history[:, base:end], start - base if masked else None)
        y = _direct(window, k, end - i)
        for level, (begin, first) in _due(i).items():
            # A tile made with a filter that was too short for it ends early.
            if (level not in tiles or tiles[level][0] != first
                    or tiles[level][1].shape[1] < end - first):
                past = _since(history[:, begin:first], start - begin if masked else None)
                size = SHORT * RATIO ** level
                tiles[level] = first, _tile(past, k[:, :first - begin + size], size)
            part = tiles[level][1][:, i - first:end - first]
            # A document that began after the tile was made owes nothing to it.
            y = y + (part if not masked else torch.where((start < first)[:, None, None], part, 0))
        ys.append(y)
    y = ys[0] if len(ys) == 1 else torch.cat(ys, dim=1)
    after = _trimmed(history, start)
    if after.history.shape[1] == old + length:
        due = _due(old + length - 1)
        after.tiles = {j: tile for j, tile in tiles.items() if j in due}
    return y.to(x.dtype), after


def _due(i: int) -> dict[int, tuple[int, int]]:
    """The tiles that reach output i: level -> where their inputs begin and end."""
    due, level, size = {}, 0, SHORT
    while size <= i:
        end, begin = i // size * size, i // (size * RATIO) * (size * RATIO)
        if begin < end:
            due[level] = begin, end
        level, size = level + 1, size * RATIO
    return due


def _direct(window: Tensor, k: Tensor, count: int) -> Tensor:
    """The last `count` outputs of a window of at most SHORT inputs."""
    if count == 1:
        lags = k[:, :window.shape[1]].to(window.dtype).flip(1).T
        return (window * lags).sum(1, keepdim=True)
    return long_conv(window, k[:, :window.shape[1]])[:, -count:]


def _tile(past: Tensor, k: Tensor, size: int) -> Tensor:
    """What the inputs `past` (B, P, D) add to the `size` outputs after them; k: (D, P + size).

    The transform is circular; what wraps around lands on outputs that are not read.
    """
    n = fast_size(k.shape[1])
    product = (torch.fft.rfft(past.transpose(1, 2), n=n)
               * torch.fft.rfft(k.to(past.dtype), n=n))
    y = torch.fft.irfft(product, n=n)[..., past.shape[1]:past.shape[1] + size]
    return y.transpose(1, 2).contiguous()


def _since(x: Tensor, start: Tensor | None) -> Tensor:
    """x (B, T, D) with zeros before each row's `start`, which may lie outside."""
    if start is None:
        return x
    steps = torch.arange(x.shape[1], device=x.device)
    return torch.where((steps >= start[:, None])[..., None], x, 0)


def _whole(x: Tensor, k: Tensor, state: ConvState | None, reset: Tensor | None,
           ) -> tuple[Tensor, Tensor | None, int]:
    """History and new inputs, where documents begin in both together, and the history's length."""
    x_ = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    if state is None:
        _check(k, x.shape[1])
        return (x if reset is None else x_), reset, 0
    batch, old = state.history.shape[:2]
    if (batch, state.history.shape[2]) != (x.shape[0], x.shape[2]):
        raise ManyformError(f"the state is for {batch} rows of {state.history.shape[2]} channels, "
                            f"and the input has {x.shape[0]} rows of {x.shape[2]}")
    _check(k, old + x.shape[1])
    whole = append(state.history, x_.to(state.history.dtype), 1)
    if reset is None and not bool((state.start > 0).any()):
        return whole, None, old
    marks = torch.zeros(whole.shape[:2], dtype=torch.bool, device=x.device)
    if reset is not None:
        marks[:, old:] = reset
    steps = torch.arange(whole.shape[1], device=x.device)
    return whole, marks | ((steps == state.start[:, None]) & (steps > 0)), old


def _check(k: Tensor, length: int) -> None:
    if k.shape[1] < length:
        raise ManyformError(f"the filter must reach over all {length} inputs of the stream, and "
                            f"has {k.shape[1]} values")


def _after(whole: Tensor, state: ConvState | None, marks: Tensor | None, x: Tensor,
           reset: Tensor | None) -> ConvState:
    history = whole.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    start = (torch.zeros(x.shape[0], dtype=torch.int64, device=x.device) if state is None
             else state.start)
    if reset is not None and marks is not None:
        steps = torch.arange(whole.shape[1], device=x.device)
        start = torch.where(marks, steps, 0).amax(1)
    return _trimmed(history, start)


def _trimmed(history: Tensor, start: Tensor) -> ConvState:
    """Without what no row's document reaches."""
    first = int(start.min()) if start.numel() else 0
    return ConvState(history[:, first:], start - first) if first else ConvState(history, start)
