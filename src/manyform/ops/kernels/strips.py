"""Tile products of a mini-batch of sixteen tokens: one row of tiles, see `tiles` and `delta_forms`.

C [16, n] = A [16, k] B [k, n] of rows(A) and pairs(B). A contraction over sixteen tokens is padded
to 32 with zeros. Addresses and strides in bytes.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from manyform.ops.kernels.lanes import FAST, WIDTH, load
from manyform.ops.kernels.tiles import (
    _call,
    _load_c,
    _move,
    _store_c,
    _zero,
    store_half,
    store_pairs,
)

SIZE = 16
"""Tokens of a mini-batch at most."""

_load_left = _move("tileloadd64", (4,))
_load_three = _move("tileloadd64", (5, 6, 7))
_load_one = _move("tileloadd64", (5,))
_store_one = _move("tilestored64", (0,))


def _products(*triples: tuple[int, int, int]) -> Any:
    """An intrinsic that adds A B to C for each (C, A, B) of tiles."""
    @intrinsic
    def run(typing: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for triple in triples:
                _call(builder, "tdpbf16ps", [ir.IntType(8)(tile) for tile in triple])
            return context.get_dummy_value()
        return types.void(), code
    return run


_three = _products((0, 4, 5), (1, 4, 6), (2, 4, 7))
_fourth = _products((3, 4, 5))
_single = _products((0, 4, 5))


@numba.njit(fastmath=FAST, cache=True)
def strip(c, c_row, fresh, a, a_row, b, b_row, n, k):
    """C (16, n) float32 = (fresh) or += A (16, k) B (k, n); n a multiple of 64, k of 32."""
    for j in range(0, n, 64):
        at = c + 4 * j
        corners = (at, at + 64, at + 128, at + 192)
        if fresh:
            _zero()
        else:
            _load_c(corners, c_row)
        for s in range(0, k, 32):
            right = b + s // 2 * b_row + 4 * j
            _load_left((a + 2 * s,), a_row)
            _load_three((right, right + 64, right + 128), b_row)
            _three()
            _load_one((right + 192,), b_row)
            _fourth()
        _store_c(corners, c_row)


@numba.njit(fastmath=FAST, cache=True)
def square(c, c_row, a, a_row, b, b_row, k):
    """C (16, 16) float32 = A (16, k) B (k, 16); k a multiple of 32."""
    _zero()
    for s in range(0, k, 32):
        _load_left((a + 2 * s,), a_row)
        _load_one((b + s // 2 * b_row,), b_row)
        _single()
    _store_one((c,), c_row)


@numba.njit(fastmath=FAST, cache=True)
def copy_rows(source, base, step, steps, width, wide, into, at):
    """rows() of a mini-batch of tokens, which lie `step` apart; zero after the last."""
    for t in range(steps):
        for j in range(0, width, WIDTH):
            store_half(into, at + t * wide + j, load(source, base + t * step + j))
    for j in range(at + steps * wide, at + SIZE * wide):
        into[j] = 0


@numba.njit(fastmath=FAST, cache=True)
def pair_rows(z, at, width, wide, into, to):
    """pairs() of sixteen rows of float32 or bfloat16."""
    for t in range(0, SIZE, 2):
        for j in range(0, width, WIDTH):
            store_pairs(into, to + t // 2 * wide + j, load(z, at + t * wide + j),
                        load(z, at + (t + 1) * wide + j))


@numba.njit(fastmath=FAST, cache=True)
def pair_alone(z, at, width, wide, into, to):
    """`pair_rows` with zeros where sixteen more rows would be."""
    pair_rows(z, at, width, wide, into, to)
    into[to + SIZE // 2 * wide:to + SIZE * wide] = 0


@numba.njit(fastmath=FAST, cache=True)
def pair_square(z, into, to):
    """pairs() of 16 x 16 float32."""
    for t in range(0, SIZE, 2):
        store_pairs(into, to + t // 2 * SIZE, load(z, t * SIZE), load(z, (t + 1) * SIZE))
