"""The gradient of a linear map's weights, G^T X summed over all tokens, on tiles (see `tiles`).

Both operands lie by tokens, and the sum runs over tokens: the right operand needs neighbouring
tokens in pairs, the left one is these pairs turned by 90 degrees (see `delta_forms`). Turning costs
a third of a product with 256 columns, so the narrower matrix is the turned one. A panel of both for
`STEPS` x 32 tokens stays near while their products are added up in float32.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from manyform.ops.kernels import dense, threads
from manyform.ops.kernels.delta_forms import _pair_block, _turn_block
from manyform.ops.kernels.lanes import FAST, WIDTH, flat, load, store
from manyform.ops.kernels.tiles import SHAPE, configure, product, release

SIDE = 32  # tokens a step, and columns of a panel
STEPS = 8
BYTES = 2 * SIDE * SIDE  # a step of a panel: two tiles, for its columns to 16 and to 32
PANEL = STEPS * BYTES
WIDE = 1024  # columns of the right operand at once


@numba.njit(fastmath=FAST, cache=True)
def _line(z, row, token, tokens, column, width, into):
    """32 columns of two tokens, zeros beyond the end of either."""
    for half in range(2):
        for j in range(SIDE):
            inside = token + half < tokens and column + j < width
            into[half * SIDE + j] = z[(token + half) * row + column + j] if inside else 0


@numba.njit(fastmath=FAST, cache=True)
def _pairs(z, row, first, steps, tokens, begin, end, width, edge, into):
    """Columns `begin` to `end` in pairs of tokens; rows are read as they lie in memory."""
    data, spare = z.ctypes.data, edge.ctypes.data
    for r in range(steps * WIDTH):
        token = first + 2 * r
        line = into + r // WIDTH * BYTES + r % WIDTH * 4 * WIDTH
        for j in range(begin, end, SIDE):
            at, step = data + 2 * (token * row + j), 2 * row
            if token + 2 > tokens or j + SIDE > width:
                _line(z, row, token, tokens, j, width, edge)
                at, step = spare, 2 * SIDE
            target = line + (j - begin) // SIDE * PANEL
            _pair_block(at, at + step, target)
            _pair_block(at + 2 * WIDTH, at + step + 2 * WIDTH, target + BYTES // 2)


@numba.njit(fastmath=FAST, cache=True, parallel=True)
def _products(left, left_row, m, right, right_row, n, tokens, sums):
    """sums[p] (m, n), m and n padded to 32: left^T right over the p-th share of the tokens."""
    parts, rows, columns = sums.shape
    span = SIDE * STEPS
    chunks = (tokens + span - 1) // span
    for p in numba.prange(parts):
        configure(SHAPE.ctypes.data)
        edge = np.empty(2 * SIDE, np.uint16)
        a = np.empty(rows // SIDE * PANEL + 64, np.uint8)
        b = np.empty(min(WIDE, columns) // SIDE * PANEL + 64, np.uint8)
        a_at, b_at = (a.ctypes.data + 63) // 64 * 64, (b.ctypes.data + 63) // 64 * 64
        begin = chunks * p // parts
        for chunk in range(begin, chunks * (p + 1) // parts):
            base = chunk * span
            steps = (min(span, tokens - base) + SIDE - 1) // SIDE
            _pairs(left, left_row, base, steps, tokens, 0, rows, m, edge, a_at)
            for tile in range(rows // SIDE * STEPS * 2):
                at = a_at + tile * BYTES // 2
                _turn_block(at, 4 * WIDTH, at, 4 * WIDTH)
            for block in range(0, columns, WIDE):
                until = min(columns, block + WIDE)
                _pairs(right, right_row, base, steps, tokens, block, until, n, edge, b_at)
                for i in range(0, rows, SIDE):
                    for j in range(block, until, SIDE):
                        product(sums[p].ctypes.data + 4 * (i * columns + j), 4 * columns,
                                chunk == begin, a_at + i // SIDE * PANEL, 64, BYTES,
                                b_at + (j - block) // SIDE * PANEL, BYTES // 2, BYTES, steps)
        release()


@numba.njit(fastmath=FAST, cache=True, parallel=True)
def _finish(sums, parts, rows, columns, turned):
    """The shares (parts, rows, columns) added up in the first of them, or in `turned` (columns,
    rows)."""
    for band in numba.prange(rows // WIDTH):
        first = band * WIDTH * columns
        for at in range(first, first + WIDTH * columns, WIDTH):
            for p in range(1, parts):
                store(sums, at, load(sums, at) + load(sums, p * rows * columns + at))
        if turned.size:
            for j in range(0, columns, WIDTH):
                _turn_block(sums.ctypes.data + 4 * (first + j), 4 * columns,
                            turned.ctypes.data + 4 * (j * rows + band * WIDTH), 4 * rows)


def weight_gradient(g: Tensor, x: Tensor) -> Tensor:
    """g (..., O), x (..., I), bfloat16 -> (O, I) float32."""
    g, x = (dense(z.reshape(-1, z.shape[-1])) for z in (g, x))
    swap = x.shape[1] < g.shape[1]
    left, right = (x, g) if swap else (g, x)
    (tokens, m), n = left.shape, right.shape[1]
    span = SIDE * STEPS
    parts = max(1, min(threads(), (tokens + span - 1) // span))
    rows, columns = (-(-width // SIDE) * SIDE for width in (m, n))
    sums = torch.empty(parts, rows, columns)
    turned = torch.empty((columns, rows) if swap else (0, 0))
    products: Any = _products
    products(flat(left), left.stride(0), m, flat(right), right.stride(0), n, tokens, sums.numpy())
    if swap or parts > 1:
        finish: Any = _finish
        finish(flat(sums), parts, rows, columns, flat(turned))
    out = turned if swap else sums[0]
    return out[:g.shape[1], :x.shape[1]].contiguous()
