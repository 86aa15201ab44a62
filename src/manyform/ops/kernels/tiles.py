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

from manyform.ops.kernels.lanes import FAST, WIDTH, lanes, splat

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_V16, _V32 = ir.VectorType(ir.IntType(16), WIDTH), ir.VectorType(_I32, WIDTH)
_VF = ir.VectorType(ir.FloatType(), WIDTH)


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


@numba.njit(fastmath=FAST, cache=True)
def slide(c, c_row, fresh, a, a_row, a_step, b, b_side, b_row, b_step, steps):
    """`product` where the rows of B, too, lie apart by any distance, and tiles may overlap."""
    corners = (c, c + 64, c + 16 * c_row, c + 16 * c_row + 64)
    if fresh:
        _zero()
    else:
        _load_c(corners, c_row)
    for s in range(steps):
        at = a + s * a_step
        _load_a((at, at + 16 * a_row), a_row)
        at = b + s * b_step
        _load_b((at, at + b_side), b_row)
        _multiply()
    _store_c(corners, c_row)


class _BFloat(ir.types.Type):
    """LLVM's bfloat, which llvmlite does not name; processors with tiles convert to it at once."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


def _bfloat16(builder: Any, value: Any) -> Any:
    """Sixteen bfloat16, as 16 bits each."""
    half = builder.fptrunc(value, ir.VectorType(_BFloat(), WIDTH))
    return builder.bitcast(half, _V16)


def _store(context: Any, builder: Any, array: Any, args: Any, value: Any, align: int) -> Any:
    data = context.make_array(array)(context, builder, args[0]).data
    at = builder.bitcast(builder.gep(data, [args[1]]), value.type.as_pointer())
    builder.store(value, at, align=align)
    return context.get_dummy_value()


@intrinsic
def store_half(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """Write sixteen lanes as bfloat16 (to a uint16 array), in one instruction and a store."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _store(context, builder, array, args, _bfloat16(builder, args[2]), 2)
    return types.void(array, types.intp, lanes), code


@intrinsic
def store_pairs(typing: Any, array: Any, index: Any, a: Any, b: Any) -> Any:
    """Write (a_n, b_n), n = 0 ... 15, as pairs of bfloat16: one row of a B tile (uint32)."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        low, high = (builder.zext(_bfloat16(builder, x), _V32) for x in args[2:])
        both = builder.or_(low, builder.shl(high, ir.Constant(_V32, [16] * WIDTH)))
        return _store(context, builder, array, args, both, 4)
    return types.void(array, types.intp, lanes, lanes), code


@intrinsic
def exceeds(typing: Any, value: Any, limit: Any) -> Any:
    """True if any lane is larger than the limit, or not a number."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        limit = builder.insert_element(ir.Constant(_VF, ir.Undefined), args[1], _I32(0))
        limit = builder.shuffle_vector(limit, limit, ir.Constant(_V32, [0] * WIDTH))
        over = builder.bitcast(builder.fcmp_unordered(">", args[0], limit), ir.IntType(WIDTH))
        return builder.icmp_unsigned("!=", over, ir.IntType(WIDTH)(0))
    return types.boolean(lanes, types.float32), code


@intrinsic
def _reciprocal(typing: Any, value: Any) -> Any:
    """1 / v with a relative error of 2^-14."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        mask = ir.IntType(16)
        kind = ir.FunctionType(_VF, [_VF, _VF, mask])
        near = builder.module.declare_intrinsic("llvm.x86.avx512.rcp14.ps.512", fnty=kind)
        return builder.call(near, [args[0], args[0], mask(0xFFFF)])
    return lanes(lanes), code


@numba.njit(inline="always")
def sigmoid(v):  # type: ignore[no-untyped-def]
    """1 / (1 + e^-v) with a relative error of 7e-5, for what will be bfloat16."""
    return _reciprocal(splat(np.float32(1)) + exp2(v * splat(np.float32(-1.4426950408889634))))


# gelu(v) = v sigmoid(v (a + c v^2)), GELU by tanh
A, C = np.float32(2 * 0.7978845608028654), np.float32(2 * 0.7978845608028654 * 0.044715)


@numba.njit(inline="always")
def gelu(v):  # type: ignore[no-untyped-def]
    """GELU by tanh, as exact as `sigmoid`."""
    return v * sigmoid(v * (splat(A) + splat(C) * v * v))


@numba.njit(inline="always")
def gelu_slope(v):  # type: ignore[no-untyped-def]
    """Its derivative: s + v s (1 - s) (a + 3 c v^2)."""
    cubic, one = splat(C) * v * v, splat(np.float32(1))
    s = sigmoid(v * (splat(A) + cubic))
    return s * (one + v * (one - s) * (splat(A) + splat(np.float32(3)) * cubic))


# 2^f on [-1/2, 1/2]; relative error 4e-6, far below the 4e-3 of bfloat16.
_EXP2 = (1.0, 0.69314718, 0.24022651, 0.05550411, 0.00967184)


@intrinsic
def exp2(typing: Any, value: Any) -> Any:
    """2^x, exactly 0 far below and NaN for NaN."""
    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        flags = ("contract", "nsz", "arcp")
        near = builder.module.declare_intrinsic("llvm.rint.v16f32",
                                                fnty=ir.FunctionType(_VF, [_VF]))
        whole = builder.call(near, [args[0]])
        f = builder.fsub(args[0], whole)
        p = ir.Constant(_VF, [_EXP2[-1]] * WIDTH)
        for c in _EXP2[-2::-1]:
            p = builder.fadd(builder.fmul(p, f, flags=flags), ir.Constant(_VF, [c] * WIDTH),
                             flags=flags)
        # p 2^whole, one instruction where there are tiles
        mask, rounding = ir.IntType(16), _I32
        scale = ir.FunctionType(_VF, [_VF, _VF, _VF, mask, rounding])
        scale = builder.module.declare_intrinsic("llvm.x86.avx512.mask.scalef.ps.512", fnty=scale)
        return builder.call(scale, [p, whole, p, mask(0xFFFF), rounding(4)])
    return lanes(lanes), code
