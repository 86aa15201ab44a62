"""Operands of tile products in panels (see `tiles`): memory is read from front to back.

A panel has 32 rows of the left operand A, or 32 columns of the right one B, and `STEP` elements for
each 32 steps of the sum, one after the other, in two tiles. `LENGTH` such steps of two panels fit
into the first-level cache. All is padded with zeros to whole panels.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from manyform.ops.kernels import threads
from manyform.ops.kernels.delta_forms import _pair_block, _turn_block
from manyform.ops.kernels.lanes import FAST, WIDTH, flat, get, load, put
from manyform.ops.kernels.tiles import product, store_half

SIDE = 32
STEP = SIDE * SIDE
BYTES = 2 * STEP
LENGTH = 8
BLOCK = 256
"""Rows of A that a worker takes at once, at most: they stay in the second-level cache."""


@numba.njit(fastmath=FAST, cache=True)
def _line(w, row, rows, column, columns, into, at):
    """Sixteen neighbours of a row as bfloat16, zeros beyond the matrix."""
    if row < rows and column + WIDTH <= columns:
        store_half(into, at, load(w, row * columns + column))
        return
    for j in range(WIDTH):
        inside = row < rows and column + j < columns
        put(into, at + j, get(w, row * columns + column + j) if inside else np.float32(0))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def pack_turned(w, maps, rows, columns, panels):
    """Panels of B = W^T from `maps` matrices W, each with zeros up to whole panels."""
    across, steps = (rows + SIDE - 1) // SIDE, (columns + SIDE - 1) // SIDE
    for panel in numba.prange(maps * across):
        lines = np.empty(SIDE * WIDTH, np.uint16)
        own = w[panel // across * rows * columns:]
        for s in range(steps):
            for side in range(2):
                first = panel % across * SIDE + side * WIDTH
                for r in range(WIDTH):
                    for half in range(2):
                        _line(own, first + r, rows, s * SIDE + half * WIDTH, columns, lines,
                              r * SIDE + half * WIDTH)
                to = panels.ctypes.data + (panel * steps + s) * BYTES + side * BYTES // 2
                _turn_block(lines.ctypes.data, 2 * SIDE, to, 4 * WIDTH)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def pack(w, maps, rows, columns, panels):
    """Panels of B = W; of two matrices, steps in turn."""
    across, steps = (columns + SIDE - 1) // SIDE, (rows + SIDE - 1) // SIDE
    for panel in numba.prange(across):
        lines = np.empty(2 * WIDTH, np.uint16)
        for step in range(maps * steps):
            own, s = w[step % maps * rows * columns:], step // maps
            for side in range(2):
                to = panels.ctypes.data + (panel * maps * steps + step) * BYTES + side * BYTES // 2
                column = panel * SIDE + side * WIDTH
                for r in range(WIDTH):
                    for half in range(2):
                        _line(own, s * SIDE + 2 * r + half, rows, column, columns, lines,
                              half * WIDTH)
                    _pair_block(lines.ctypes.data, lines.ctypes.data + 2 * WIDTH,
                                to + 4 * r * WIDTH)


@numba.njit(fastmath=FAST, cache=True)
def read(z, first, tokens, block, d, panels):
    """Panels of A from rows of z; zeros after the last."""
    for t in range(block):
        to = t // SIDE * SIDE * d + t % SIDE * SIDE
        for j in range(0, d, SIDE):
            if t < tokens:
                at = (first + t) * d + j
                store_half(panels, to + j * SIDE, load(z, at))
                store_half(panels, to + j * SIDE + WIDTH, load(z, at + WIDTH))
            else:
                panels[to + j * SIDE:to + j * SIDE + SIDE] = 0


@numba.njit(fastmath=FAST, cache=True)
def across(panels, block, d, into):
    """Panels of A = Z^T from those of A = Z: the sum runs over the block's tokens."""
    steps = block // SIDE
    for i in range(steps):
        for j in range(d // SIDE):
            at = panels.ctypes.data + (i * (d // SIDE) + j) * BYTES
            to = into.ctypes.data + (j * steps + i) * BYTES
            for side in range(2):
                there, here = to + side * BYTES // 2, at + 2 * side * WIDTH
                for r in range(WIDTH):
                    _pair_block(here + 4 * r * SIDE, here + (4 * r + 2) * SIDE,
                                there + 4 * r * WIDTH)
                _turn_block(there, 4 * WIDTH, there, 4 * WIDTH)


@numba.njit(fastmath=FAST, cache=True)
def tile(c, fresh, a, b, steps):
    """A square of C, 32 dense rows of float32, = (fresh) or += `steps` steps of two panels."""
    product(c, 4 * SIDE, fresh, a, 2 * SIDE, BYTES, b, BYTES // 2, BYTES, steps)


@numba.njit(fastmath=FAST, cache=True)
def multiply(c, fresh, a, a_panel, b, b_panel, rows, columns, steps):
    """Squares of C, row after row of them, by all panels of A and B, which lie a_panel and b_panel
    bytes apart."""
    for s in range(0, steps, LENGTH):
        for j in range(columns):
            for i in range(rows):
                tile(c + 4 * STEP * (i * columns + j), fresh and s == 0,
                      a + i * a_panel + s * BYTES, b + j * b_panel + s * BYTES,
                      min(LENGTH, steps - s))


@numba.njit(fastmath=FAST, cache=True)
def write(c, first, tokens, d, z):
    """Rows of z, bfloat16, from squares of C."""
    for t in range(tokens):
        at, to = t // SIDE * SIDE * d + t % SIDE * SIDE, (first + t) * d
        for j in range(0, d, SIDE):
            store_half(z, to + j, load(c, at + j * SIDE))
            store_half(z, to + j + WIDTH, load(c, at + j * SIDE + WIDTH))


def blocks(rows: int) -> tuple[int, int]:
    """Rows a block, and workers, each of which has one at least."""
    share = -(-rows // threads())
    block = min(BLOCK, -(-share // SIDE) * SIDE)
    return block, min(threads(), -(-rows // block))


def panels(w: Tensor, maps: int = 1, *, turned: bool) -> Any:
    """B = W^T if turned, else B = W, of `maps` matrices that stand one above the other; float32 or
    bfloat16."""
    rows, columns = len(w) // maps, w.shape[1]
    whole = -(-rows // SIDE) * -(-columns // SIDE) * maps
    made = torch.empty(whole * STEP // 2, dtype=torch.int32).numpy()
    run: Any = pack_turned if turned else pack
    run(flat(w.contiguous()), maps, rows, columns, made)
    return made
