"""The matrix tiles of recent x86 processors (AMX) inside numba functions.

Eight registers hold tiles of 16 rows of 64 bytes; one instruction multiplies two bfloat16 tiles
and adds the product to a float32 tile: C[16, 16] += A[16, 32] B[32, 16]. A lies in memory by rows.
B lies in pairs of rows: row r of its tile holds (B[2r, n], B[2r + 1, n]) for n = 0 ... 15.
"""

from __future__ import annotations

import ctypes
import functools
import platform
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from manyform.ops.kernels.lanes import FAST, WIDTH, lanes

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_V32, _VF = ir.VectorType(_I32, WIDTH), ir.VectorType(ir.FloatType(), WIDTH)


@functools.cache
def supported() -> bool:
    """True if this processor has the tiles and the system lets this process use them."""
    if platform.system() != "Linux" or not torch.cpu._is_amx_tile_supported():
        return False
    request, tile_data = 0x1023, 18  # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
    return ctypes.CDLL(None).syscall(158, request, tile_data) == 0


def _shape() -> np.ndarray:
    layout = np.zeros(64, np.uint8)
    layout[0] = 1  # palette: eight tiles
    layout[16:32:2] = 64  # bytes a row
    layout[48:56] = 16  # rows
    return layout


SHAPE = _shape()


def _call(builder: Any, name: str, arguments: list[Any]) -> None:
    kind = ir.FunctionType(ir.VoidType(), [a.type for a in arguments])
    builder.call(builder.module.declare_intrinsic(f"llvm.x86.{name}", fnty=kind), arguments)


def _address(builder: Any, value: Any) -> Any:
    return builder.inttoptr(value, _I8.as_pointer())


@intrinsic
def configure(typing: Any, address: Any) -> Any:
    """Begin to use tiles, of the shape at this address; once a thread, before anything else."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "ldtilecfg", [_address(builder, args[0])])
        return context.get_dummy_value()
    return types.void(types.intp), code


@intrinsic
def release(typing: Any) -> Any:
    """End the use of tiles in this thread."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _call(builder, "tilerelease", [])
        return context.get_dummy_value()
    return types.void(), code


@intrinsic
def _zero(typing: Any) -> Any:
    """Tiles 0 to 3 become zero."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for tile in range(4):
            _call(builder, "tilezero", [_I8(tile)])
        return context.get_dummy_value()
    return types.void(), code


def _move(instruction: str, tiles: tuple[int, ...]) -> Any:
    """An intrinsic (first address, ..., stride) that loads or stores the given tiles."""
    @intrinsic
    def move(typing: Any, addresses: Any, stride: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            for i, tile in enumerate(tiles):
                at = _address(builder, builder.extract_value(args[0], i))
                _call(builder, instruction, [_I8(tile), at, args[1]])
            return context.get_dummy_value()
        return types.void(types.UniTuple(types.intp, len(tiles)), types.intp), code
    return move


_load_c = _move("tileloadd64", (0, 1, 2, 3))
_store_c = _move("tilestored64", (0, 1, 2, 3))
_load_a = _move("tileloadd64", (4, 5))
_load_b = _move("tileloadd64", (6, 7))


@intrinsic
def _multiply(typing: Any) -> Any:
    """C (tiles 0 1 / 2 3) += A (tiles 4 / 5) B (tiles 6 7)."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        for c, a, b in ((0, 4, 6), (1, 4, 7), (2, 5, 6), (3, 5, 7)):
            _call(builder, "tdpbf16ps", [_I8(c), _I8(a), _I8(b)])
        return context.get_dummy_value()
    return types.void(), code


@numba.njit(fastmath=FAST, cache=True)
def product(c, c_row, fresh, a, a_row, a_step, b, b_side, b_step, steps):
    """C[32, 32] = or += sum over steps of A_s[32, 32] B_s[32, 32]; all arguments in bytes.

    c, a, b: addresses. c_row, a_row: from one row to the next. a_step, b_step: from one step to the
    next. b_side: from the left 16 columns of B to the right 16. fresh: C is overwritten.
    """
    corners = (c, c + 64, c + 16 * c_row, c + 16 * c_row + 64)
    if fresh:
        _zero()
    else:
        _load_c(corners, c_row)
    for s in range(steps):
        at = a + s * a_step
        _load_a((at, at + 16 * a_row), a_row)
        at = b + s * b_step
        _load_b((at, at + b_side), 64)
        _multiply()
    _store_c(corners, c_row)


def _bfloat16_bits(builder: Any, value: Any) -> Any:
    """bfloat16 bits of sixteen finite lanes, in the upper halves of 32 bits; lower halves vary."""
    bits = builder.bitcast(value, _V32)
    odd = builder.and_(builder.lshr(bits, _all(16)), _all(1))
    return builder.add(bits, builder.add(odd, _all(0x7FFF)))


def _all(value: int | float) -> Any:
    return ir.Constant(_VF if isinstance(value, float) else _V32, [value] * WIDTH)


@intrinsic
def store_pairs(typing: Any, array: Any, index: Any, a: Any, b: Any) -> Any:
    """Write (a_n, b_n), n = 0 ... 15, as pairs of bfloat16: one row of a B tile (uint32)."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        low = builder.lshr(_bfloat16_bits(builder, args[2]), _all(16))
        high = builder.and_(_bfloat16_bits(builder, args[3]), _all(0xFFFF0000))
        data = context.make_array(array)(context, builder, args[0]).data
        at = builder.bitcast(builder.gep(data, [args[1]]), _V32.as_pointer())
        builder.store(builder.or_(low, high), at, align=4)
        return context.get_dummy_value()
    return types.void(array, types.intp, lanes, lanes), code


# 2^f on [-1/2, 1/2]; relative error 4e-6, far below the 4e-3 of bfloat16.
_EXP2 = (1.0, 0.69314718, 0.24022651, 0.05550411, 0.00967184)


@intrinsic
def exp2(typing: Any, value: Any) -> Any:
    """2^x for x below 126, and exactly 0 below -126; NaN stays NaN."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        flags = ("contract", "nsz", "arcp")
        tiny = builder.fcmp_ordered("<", args[0], _all(-126.0))
        x = builder.select(tiny, _all(-126.0), args[0])
        magic = _all(12582912.0)  # 1.5 * 2^23 leaves the nearest whole number in the low bits
        shifted = builder.fadd(x, magic)
        f = builder.fsub(x, builder.fsub(shifted, magic))
        p = _all(_EXP2[-1])
        for c in _EXP2[-2::-1]:
            p = builder.fadd(builder.fmul(p, f, flags=flags), _all(c), flags=flags)
        power = builder.shl(builder.bitcast(shifted, _V32), _all(23))
        power = builder.bitcast(builder.add(power, _all(0x3F800000)), _VF)
        return builder.select(tiny, _all(0.0), builder.fmul(p, power))
    return lanes(lanes), code
