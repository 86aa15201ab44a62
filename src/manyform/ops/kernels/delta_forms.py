"""Matrices as operands of tile products (see `tiles`), each in one of two forms, rows dense.

rows(Z): Z in bfloat16, row by row: the left operand of Z B. pairs(Z): words whose halves are
neighbours in a column, (Z[2r, n], Z[2r + 1, n]), half as many rows: the right operand of A Z. Seen
as words, rows(Z) turned by 90 degrees is pairs(Z^T), and pairs(Z) turned is rows(Z^T), so one
transposition of 16 x 16 words serves every transposed operand. Addresses and strides in bytes.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from manyform.ops.kernels.lanes import FAST, WIDTH, lanes, load, splat, store
from manyform.ops.kernels.tiles import (
    _load_a,
    _load_b,
    _load_c,
    _multiply,
    _store_c,
    _zero,
    store_half,
    store_pairs,
)

_I32 = ir.IntType(32)
_V16, _V32 = ir.VectorType(ir.IntType(16), WIDTH), ir.VectorType(_I32, WIDTH)


def _at(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


@intrinsic
def _turn_block(typing: Any, source: Any, source_row: Any, target: Any, target_row: Any) -> Any:
    """Transpose 16 x 16 words: at each of four stages, halves of ever smaller blocks change."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def row(base: Any, stride: Any, i: int) -> Any:
            address = builder.add(base, builder.mul(stride, ir.IntType(64)(i)))
            return _at(builder, address, _V32)
        lines = [builder.load(row(args[0], args[1], i), align=4) for i in range(WIDTH)]
        for s in (8, 4, 2, 1):
            upper = ir.Constant(_V32, [i if not i & s else WIDTH + i - s for i in range(WIDTH)])
            lower = ir.Constant(_V32, [i + s if not i & s else WIDTH + i for i in range(WIDTH)])
            after = list(lines)
            for i in range(WIDTH):
                if not i & s:
                    after[i] = builder.shuffle_vector(lines[i], lines[i + s], upper)
                    after[i + s] = builder.shuffle_vector(lines[i], lines[i + s], lower)
            lines = after
        for i, line in enumerate(lines):
            builder.store(line, row(args[2], args[3], i), align=4)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, types.intp, types.intp), code


@intrinsic
def _pair_block(typing: Any, even: Any, odd: Any, target: Any) -> Any:
    """Sixteen words of a pair of rows of bfloat16."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        low, high = (builder.zext(builder.load(_at(builder, x, _V16), align=2), _V32)
                     for x in args[:2])
        both = builder.or_(low, builder.shl(high, ir.Constant(_V32, [16] * WIDTH)))
        builder.store(both, _at(builder, args[2], _V32), align=4)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp, types.intp), code


@intrinsic
def visible(typing: Any, value: Any, factor: Any) -> Any:
    """value * factor; 0 where the factor is 0, whatever the value is."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = ir.Constant(args[0].type, [0.0] * WIDTH)
        hidden = builder.fcmp_ordered("==", args[1], zero)
        return builder.select(hidden, zero, builder.fmul(*args))
    return lanes(lanes, lanes), code


@intrinsic
def positive(typing: Any, value: Any, x: Any) -> Any:
    """value where x > 0, else 0."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        zero = ir.Constant(args[0].type, [0.0] * WIDTH)
        return builder.select(builder.fcmp_ordered(">", args[1], zero), args[0], zero)
    return lanes(lanes, lanes), code


@intrinsic
def _fetch(typing: Any, array: Any, index: Any) -> Any:
    """Bring a line of memory near; an address outside the array does no harm."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(array)(context, builder, args[0]).data
        at = builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [at.type, _I32, _I32, _I32])
        call = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(call, [at, _I32(0), _I32(2), _I32(1)])
        return context.get_dummy_value()
    return types.void(array, types.intp), code


@numba.njit(fastmath=FAST, cache=True)
def fetch(x, at, step, rows, width):
    """Bring rows of x near that will be read soon: they lie too far apart for the processor to
    guess."""
    line = 64 // x.itemsize
    for t in range(rows):
        for j in range(0, width, line):
            _fetch(x, at + t * step + j)


@numba.njit(fastmath=FAST, cache=True)
def turn(source, target, rows, words):
    """(rows, words) words -> (words, rows); both multiples of 16."""
    for i in range(0, rows, WIDTH):
        for j in range(0, words, WIDTH):
            _turn_block(source + 4 * (i * words + j), 4 * words, target + 4 * (j * rows + i),
                        4 * rows)


@numba.njit(fastmath=FAST, cache=True)
def pair(source, target, rows, width):
    """rows(Z) -> pairs(Z), Z of this many rows and columns."""
    for i in range(0, rows, 2):
        at = source + 2 * i * width
        for j in range(0, width, WIDTH):
            _pair_block(at + 2 * j, at + 2 * (width + j), target + 2 * (i * width + 2 * j))


@numba.njit(fastmath=FAST, cache=True)
def fade(z, factors, rows, width):
    """Multiply rows of float32 by a factor each, in place."""
    for i in range(rows):
        factor = splat(factors[i])
        for j in range(i * width, (i + 1) * width, WIDTH):
            store(z, j, load(z, j) * factor)


@numba.njit(fastmath=FAST, cache=True)
def halve(z, rows, width, into):
    """float32 -> rows(Z)."""
    for j in range(0, rows * width, WIDTH):
        store_half(into, j, load(z, j))


@numba.njit(fastmath=FAST, cache=True)
def halve_pairs(z, rows, width, into):
    """float32 -> pairs(Z)."""
    for i in range(0, rows, 2):
        for j in range(0, width, WIDTH):
            at = i * width + j
            store_pairs(into, i // 2 * width + j, load(z, at), load(z, at + width))


@numba.njit(fastmath=FAST, cache=True)
def multiply(c, c_row, fresh, a, a_row, b, b_row, m, n, k):
    """C (m, n) float32 = (fresh) or += A (m, k) B (k, n), of rows(A) and pairs(B); m, n and k
    multiples of 32."""
    for i in range(0, m, 32):
        for j in range(0, n, 32):
            at = c + i * c_row + 4 * j
            corners = (at, at + 64, at + 16 * c_row, at + 16 * c_row + 64)
            if fresh:
                _zero()
            else:
                _load_c(corners, c_row)
            for s in range(0, k, 32):
                left = a + i * a_row + 2 * s
                _load_a((left, left + 16 * a_row), a_row)
                right = b + s // 2 * b_row + 4 * j
                _load_b((right, right + 64), b_row)
                _multiply()
            _store_c(corners, c_row)
