"""The forms of sparse attention that train on a CPU's matrix tiles, and which one a call takes.

Heads that share neither keys nor intervals go one at a time (`kernels.sparse_attention`); those
that share both go as rows of one product, which reads every key once for all of them
(`kernels.shared_intervals`). Both keep y and one number a query, and compute scores again on the
way back (Dao 2022, algorithm 4). Products are of bfloat16, sums and softmax float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.kernels import threads
from manyform.ops.tiled_attention import LOG2E, _readable, _strides


def tiled_intervals(q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, scale: float,
                    ) -> Tensor:
    """`sparse_attention` for arguments that the tiles take."""
    heads, groups, patterns = q.shape[1], k.shape[1], low.shape[1]
    together = _together(heads, groups, patterns)
    form = (_Together(low, high, k.shape[2], q.shape[3], together) if together > 1
            else _Apart(low, high, k.shape[2]))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _Intervals.apply(q, k, v, form, scale)
    q, k, v = (_readable(x) for x in (q, k, v))
    return form.forward(q, k, v, scale)[0]


class _Intervals(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, form: _Apart | _Together,
                scale: float) -> Tensor:
        q, k, v = (_readable(x) for x in (q, k, v))
        y, peaks = form.forward(q, k, v, scale)
        ctx.save_for_backward(q, k, v, y, peaks)
        ctx.form, ctx.scale = form, scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        q, k, v, y, peaks = ctx.saved_tensors
        gradients = ctx.form.backward(q, k, v, _readable(dy.to(q.dtype)), y, peaks, ctx.scale)
        return *(x.transpose(1, 2) for x in gradients), None, None


class _Apart:
    """Every head by itself; low, high as in `sparse_attention`, of so many keys."""

    def __init__(self, low: Tensor, high: Tensor, keys: int) -> None:
        from manyform.ops.kernels.sparse_plan import plan
        first, end = (x.flatten(0, 1).contiguous().numpy() for x in (low, high))
        self.meetings = (*plan(first, end, keys), low.shape[1])
        far_starts = self.meetings[6]
        self.gathers = bool((far_starts[:, 0] < far_starts[:, -1]).any())

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """y, and the logarithm of each query's sum, (B, H, T) and padding."""
        import numpy as np

        from manyform.ops.kernels import sparse_attention as kernels
        from manyform.ops.kernels.lanes import flat
        batch, heads, n, d = q.shape
        y = torch.empty(batch, n, heads, d, dtype=q.dtype).transpose(1, 2)
        peaks = torch.empty(batch, heads, -(-n // kernels.SIDE) * kernels.SIDE)
        sizes = kernels.scratch(n, k.shape[2], d, self.gathers, False)
        run: Any = kernels.forward
        run(*_placed(q, k, v), *_sizes(q, k), *self.meetings, np.float32(scale * LOG2E), flat(y),
            _strides(y), peaks.numpy(), *_scratch(sizes))
        return y, peaks

    def backward(self, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, y: Tensor, peaks: Tensor,
                 scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v as (B, T or S, H or G, D)."""
        import numpy as np

        from manyform.ops.kernels import sparse_attention as kernels
        from manyform.ops.kernels.lanes import flat
        heads, groups, n, keys, d = _sizes(q, k)
        dq = torch.empty(len(q), n, heads, d, dtype=q.dtype)
        dk, dv = (torch.empty(len(q), keys, heads, d, dtype=q.dtype) for _ in range(2))
        sizes = kernels.scratch(n, keys, d, self.gathers, True)
        run: Any = kernels.backward
        run(*_placed(q, k, v, dy, y), heads, groups, n, keys, d, *self.meetings,
            np.float32(scale * LOG2E), np.float32(scale), peaks.numpy(), flat(dq), flat(dk),
            flat(dv), *_scratch(sizes))
        if heads > groups:
            dk, dv = (x.view(len(q), keys, groups, -1, d).sum(3, dtype=torch.float32).to(x.dtype)
                      for x in (dk, dv))
        return dq, dk, dv


class _Together:
    """`together` heads as rows of one query; starts, visitors and edges are what the loops walk
    through, a span of queries at a time."""

    def __init__(self, low: Tensor, high: Tensor, keys: int, d: int, together: int) -> None:
        import numpy as np

        from manyform.ops.kernels.shared_intervals import SPAN
        from manyform.ops.kernels.sparse_plan import KEYS, SIDE, measure, visit
        batch, sets, n, intervals = low.shape
        self.together, self.span = together, max(SPAN * 64 // d // together, SIDE)
        self.spans = -(-n // self.span)
        tail = self.spans * self.span - n
        low, high = (F.pad(x, (0, 0, 0, tail)) if tail else x for x in (low, high))
        first, end = (x.reshape(-1, self.span, intervals).numpy() for x in (low, high))
        starts = np.empty((batch * sets * self.spans, -(-keys // KEYS) + 1), np.int64)
        count = measure(first, end, starts)
        visitors, edges = np.empty(count, np.int32), np.empty(count, np.int32)
        visit(first, end, starts, visitors, edges)
        self.visits = (starts, visitors, edges, sets, together, self.span)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """y, and the logarithms of the sums, (B, H / together, rows of all spans)."""
        import numpy as np

        from manyform.ops.kernels import shared_intervals as kernels
        from manyform.ops.kernels.lanes import flat
        batch, heads, n, d = q.shape
        rows = self.span * self.together
        y = torch.empty(batch, n, heads, d, dtype=q.dtype).transpose(1, 2)
        peaks = torch.empty(batch, heads // self.together, self.spans * rows)
        sizes = kernels.scratch(k.shape[2], d, rows, False)
        run: Any = kernels.forward
        run(*_placed(q, k, v), *_sizes(q, k), *self.visits, np.float32(scale * LOG2E), flat(y),
            _strides(y), peaks.numpy(), kernels.RAMP, *_scratch(sizes))
        return y, peaks

    def backward(self, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, y: Tensor, peaks: Tensor,
                 scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """As of `_Apart`; keys with too few groups are shared out, and their gradients summed."""
        import numpy as np

        from manyform.ops.kernels import shared_intervals as kernels
        from manyform.ops.kernels.lanes import flat
        heads, groups, n, keys, d = _sizes(q, k)
        shares = 1 if len(q) * groups >= threads() else threads()
        dq = torch.empty(len(q), n, heads, d, dtype=q.dtype)
        dk, dv = (torch.empty(shares, len(q), keys, groups, d, dtype=q.dtype) for _ in range(2))
        sizes = kernels.scratch(keys, d, self.span * self.together, True)
        run: Any = kernels.backward
        run(*_placed(q, k, v, dy, y), heads, groups, n, keys, d, *self.visits,
            np.float32(scale * LOG2E), np.float32(scale), peaks.numpy(), flat(dq), flat(dk),
            flat(dv), kernels.RAMP, *_scratch(sizes))
        dk, dv = (x[0] if shares == 1 else x.sum(0, dtype=torch.float32).to(x.dtype)
                  for x in (dk, dv))
        return dq, dk, dv


def _together(heads: int, groups: int, patterns: int) -> int:
    """How many heads go as rows of one query: a power of two, at most 32, of those that share both
    keys and intervals."""
    shared = heads // math.lcm(groups, patterns)
    return min(shared & -shared, 32)


def _placed(*tensors: Tensor) -> list[Any]:
    """Each tensor's memory and strides, one after the other."""
    from manyform.ops.kernels.lanes import flat
    return [part for x in tensors for part in (flat(x), _strides(x))]


def _sizes(q: Tensor, k: Tensor) -> tuple[int, int, int, int, int]:
    """Heads, groups, queries, keys, features."""
    return q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3]


def _scratch(sizes: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """Floats, words and halves, a row a worker."""
    floats, words, halves = sizes
    workers = threads()
    return (torch.empty(workers, floats).numpy(),
            torch.empty(workers, words, dtype=torch.int32).numpy().view("u4"),
            torch.empty(workers, halves, dtype=torch.int16).numpy().view("u2"))
