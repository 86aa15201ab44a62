"""Rows of bfloat16 memory, any distance apart, as operands of tile products (see `tiles`).

columns  [n / 16][d / 2][16] words: the rows as columns of a right operand
pairs    [n / 32][d / 16][16][16] words: the rows as rows of a right operand
turned   [n / 32][d][32]: the rows as columns of a left operand
Addresses and distances are in bytes; n and d are multiples of 32.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from manyform.ops.kernels.delta_forms import _at, _pair_block, _turn_block
from manyform.ops.kernels.lanes import FAST, WIDTH

_I16 = ir.IntType(16)
_V16, _V32 = ir.VectorType(_I16, WIDTH), ir.VectorType(ir.IntType(32), WIDTH)


@intrinsic
def _part_block(typing: Any, words: Any, target: Any) -> Any:
    """16 x 16 words as 32 rows, 64 bytes apart, of their lower and their upper halves in turn."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for i in range(WIDTH):
            at = builder.add(args[0], ir.IntType(64)(64 * i))
            line = builder.load(_at(builder, at, _V32), align=4)
            upper = builder.lshr(line, ir.Constant(_V32, [16] * WIDTH))
            for k, half in enumerate((line, upper)):
                to = builder.add(args[1], ir.IntType(64)(64 * (2 * i + k)))
                builder.store(builder.trunc(half, _V16), _at(builder, to, _V16), align=2)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp), code


@intrinsic
def _copy_line(typing: Any, source: Any, target: Any) -> Any:
    """64 bytes."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        line = builder.load(_at(builder, args[0], _V32), align=2)
        builder.store(line, _at(builder, args[1], _V32), align=2)
        return context.get_dummy_value()
    return types.void(types.intp, types.intp), code


@intrinsic
def _clear_line(typing: Any, target: Any) -> Any:
    """64 bytes become zero."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(ir.Constant(_V32, [0] * WIDTH), _at(builder, args[0], _V32), align=2)
        return context.get_dummy_value()
    return types.void(types.intp), code


@intrinsic
def _fetch_line(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address, without waiting for it."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = ir.IntType(32)
        at = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [at.type, number, number, number])
        fetch = builder.module.declare_intrinsic("llvm.prefetch", [at.type], kind)
        builder.call(fetch, [at, number(0), number(3), number(1)])
        return context.get_dummy_value()
    return types.void(types.intp), code


@numba.njit(fastmath=FAST, cache=True)
def fetch(source, row, places, count, size):
    """Ask for `count` rows of `size` bytes at the given places before they are read."""
    for i in range(count):
        for j in range(0, size, 64):
            _fetch_line(source + places[i] * row + j)


@numba.njit(fastmath=FAST, cache=True)
def columns(source, row, n, d, target):
    for i in range(0, n, WIDTH):
        for j in range(0, d // 2, WIDTH):
            _turn_block(source + i * row + 4 * j, row, target + 2 * i * d + 64 * j, 64)


@numba.njit(fastmath=FAST, cache=True)
def pairs(source, row, n, d, target):
    for i in range(0, n, 2):
        at, to = source + i * row, target + i // 32 * d * 64 + i % 32 * 32
        for j in range(0, d, WIDTH):
            _pair_block(at + 2 * j, at + row + 2 * j, to + 64 * j)


@numba.njit(fastmath=FAST, cache=True)
def turned(source, row, n, d, target, spare):
    """spare: the address of 1 KB to use on the way."""
    for i in range(0, n, WIDTH):
        to = target + i // 32 * d * 64 + i % 32 * 2
        for j in range(0, d, 32):
            _turn_block(source + i * row + 2 * j, row, spare, 64)
            _part_block(spare, to + 64 * j)


@numba.njit(fastmath=FAST, cache=True)
def rows(source, row, count, n, d, target):
    """`count` rows side by side, and zeros up to n of them."""
    for i in range(count):
        for j in range(0, 2 * d, 64):
            _copy_line(source + i * row + j, target + 2 * i * d + j)
    for at in range(target + 2 * count * d, target + 2 * n * d, 64):
        _clear_line(at)


@numba.njit(fastmath=FAST, cache=True)
def gathered(source, row, places, count, n, d, target):
    """`rows` at the given places."""
    for i in range(count):
        for j in range(0, 2 * d, 64):
            _copy_line(source + places[i] * row + j, target + 2 * i * d + j)
    for at in range(target + 2 * count * d, target + 2 * n * d, 64):
        _clear_line(at)
