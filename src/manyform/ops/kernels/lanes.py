"""Sixteen float32 lanes as one value inside numba functions, and bfloat16 memory.

LLVM turns `<16 x float>` into the widest vectors that the machine has (one AVX-512 register, two
AVX2 ones, four NEON ones), so loops written with these need no luck with the auto-vectoriser.
bfloat16 tensors are seen as uint16 arrays; values are float32 as soon as they are loaded.
"""


from __future__ import annotations

import math
import operator

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model
from torch import Tensor

WIDTH = 16
FAST = {"contract", "nsz", "arcp"}
"""Fast-math that keeps NaN and infinity, which training must be able to see, and the order of
additions, which the rounding trick of `exp2` needs."""

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()
_V16, _V32, _VF = (ir.VectorType(t, WIDTH) for t in (_I16, _I32, _F32))
_FLAGS = ("contract", "nsz", "arcp")


class Lanes(types.Type):
    """numba's type of sixteen float32 lanes."""

    def __init__(self) -> None:
        super().__init__(name="Lanes")


lanes = Lanes()


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, kind) -> None:
        super().__init__(manager, kind, _VF)


def _splat(builder, value, vector):
    """The scalar in every lane of a vector of the given type."""
    undefined = ir.Constant(vector, ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(_I32, 0))
    zeros = ir.Constant(_V32, [0] * WIDTH)
    return builder.shuffle_vector(one, undefined, zeros)


def _const(builder, value):
    kind = _VF if isinstance(value, float) else _V32
    return ir.Constant(kind, [value] * WIDTH)


def _pointer(context, builder, array_type, array, index, kind):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), kind.as_pointer())


def _round_to_bfloat16(builder, bits, make):
    """Upper halves of float32 bit patterns, rounded to the nearest even; NaN stays NaN."""
    odd = builder.and_(builder.lshr(bits, make(16)), make(1))
    near = builder.add(bits, builder.add(odd, make(0x7FFF)))
    nan = builder.icmp_unsigned(">", builder.and_(bits, make(0x7FFFFFFF)), make(0x7F800000))
    return builder.lshr(builder.select(nan, make(0x7FC00000), near), make(16))


@intrinsic
def load(typing, array, index):
    """Sixteen neighbours of a float32 or bfloat16 array, from `index` on."""
    def generate(context, builder, signature, args):
        if array.dtype == types.float32:
            at = _pointer(context, builder, array, args[0], args[1], _VF)
            return builder.load(at, align=4)
        at = _pointer(context, builder, array, args[0], args[1], _V16)
        wide = builder.zext(builder.load(at, align=2), _V32)
        return builder.bitcast(builder.shl(wide, _const(builder, 16)), _VF)
    return lanes(array, types.intp), generate


@intrinsic
def store(typing, array, index, value):
    """Write sixteen lanes to a float32 or bfloat16 array."""
    def generate(context, builder, signature, args):
        if array.dtype == types.float32:
            at = _pointer(context, builder, array, args[0], args[1], _VF)
            builder.store(args[2], at, align=4)
        else:
            at = _pointer(context, builder, array, args[0], args[1], _V16)
            bits = builder.bitcast(args[2], _V32)
            half = _round_to_bfloat16(builder, bits, lambda c: _const(builder, c))
            builder.store(builder.trunc(half, _V16), at, align=2)
        return context.get_dummy_value()
    return types.void(array, types.intp, lanes), generate


@intrinsic
def get(typing, array, index):
    """One element of a float32 or bfloat16 array, as float32."""
    def generate(context, builder, signature, args):
        if array.dtype == types.float32:
            return builder.load(_pointer(context, builder, array, args[0], args[1], _F32))
        half = builder.load(_pointer(context, builder, array, args[0], args[1], _I16))
        return builder.bitcast(builder.shl(builder.zext(half, _I32), _I32(16)), _F32)
    return types.float32(array, types.intp), generate


@intrinsic
def put(typing, array, index, value):
    """Write one float32 to a float32 or bfloat16 array."""
    def generate(context, builder, signature, args):
        if array.dtype == types.float32:
            builder.store(args[2], _pointer(context, builder, array, args[0], args[1], _F32))
        else:
            half = _round_to_bfloat16(builder, builder.bitcast(args[2], _I32), _I32)
            at = _pointer(context, builder, array, args[0], args[1], _I16)
            builder.store(builder.trunc(half, _I16), at)
        return context.get_dummy_value()
    return types.void(array, types.intp, types.float32), generate


@intrinsic
def turn(typing, source, at, step, target, to, hop):
    """Transpose a square of 16 by 16 elements of 4 bytes: source rows lie `step` apart, target
    rows `hop`. All is read before anything is written."""
    def generate(context, builder, signature, args):
        source, at, step, target, to, hop = args
        def place(kind, array, first, distance, i):
            index = builder.add(first, builder.mul(distance, ir.Constant(distance.type, i)))
            return _pointer(context, builder, kind, array, index, _VF)
        rows = [builder.load(place(signature.args[0], source, at, step, i), align=4)
                for i in range(WIDTH)]
        # Exchange the corners of squares of 16, then of their quarters, and so on.
        for half in (8, 4, 2, 1):
            low = [j if not j & half else j - half + WIDTH for j in range(WIDTH)]
            high = [j + half if not j & half else j + WIDTH for j in range(WIDTH)]
            low, high = (ir.Constant(_V32, mask) for mask in (low, high))
            for i in range(WIDTH):
                if not i & half:
                    a, b = rows[i], rows[i + half]
                    rows[i] = builder.shuffle_vector(a, b, low)
                    rows[i + half] = builder.shuffle_vector(a, b, high)
        for i in range(WIDTH):
            builder.store(rows[i], place(signature.args[3], target, to, hop, i), align=4)
        return context.get_dummy_value()
    return (types.void(source, types.intp, types.intp, target, types.intp, types.intp), generate)


@intrinsic
def splat(typing, value):
    """One float32 in every lane."""
    return (lanes(types.float32),
            lambda context, builder, signature, args: _splat(builder, args[0], _VF))


@intrinsic
def total(typing, value):
    """The sum of the lanes, as float32."""
    def generate(context, builder, signature, args):
        sum_type = ir.FunctionType(_F32, [_F32, _VF])
        name = f"llvm.vector.reduce.fadd.v{WIDTH}f32"
        reduce = cgutils.get_or_insert_function(builder.module, sum_type, name)
        return builder.call(reduce, [_F32(0.0), args[0]], fastmath=("reassoc", "nsz"))
    return types.float32(lanes), generate


@intrinsic
def maximum(typing, a, b):
    """The larger of two lanes, lane by lane; NaN where a is NaN."""
    def generate(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[1], args[0])
    return lanes(lanes, lanes), generate


@intrinsic
def minimum(typing, a, b):
    """The smaller of two lanes, lane by lane; NaN where a is NaN."""
    def generate(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[1], args[0])
    return lanes(lanes, lanes), generate


@intrinsic
def sqrt(typing, value):
    """Square roots, lane by lane."""
    def generate(context, builder, signature, args):
        root_type = ir.FunctionType(_VF, [_VF])
        name = f"llvm.sqrt.v{WIDTH}f32"
        root = cgutils.get_or_insert_function(builder.module, root_type, name)
        return builder.call(root, [args[0]])
    return lanes(lanes), generate


@intrinsic
def exponent(typing, value):
    """The whole number e with 2^e <= v < 2^(e + 1), as a float, for positive normal v."""
    def generate(context, builder, signature, args):
        bits = builder.lshr(builder.bitcast(args[0], _V32), _const(builder, 23))
        return builder.sitofp(builder.sub(bits, _const(builder, 127)), _VF)
    return lanes(lanes), generate


@intrinsic
def mantissa(typing, value):
    """v / 2^exponent(v), from 1 up to 2, for positive normal v."""
    def generate(context, builder, signature, args):
        bits = builder.and_(builder.bitcast(args[0], _V32), _const(builder, 0x7FFFFF))
        return builder.bitcast(builder.or_(bits, _const(builder, 0x3F800000)), _VF)
    return lanes(lanes), generate


@intrinsic
def largest(typing, value):
    """The largest lane, as float32."""
    def generate(context, builder, signature, args):
        max_type = ir.FunctionType(_F32, [_VF])
        name = f"llvm.vector.reduce.fmax.v{WIDTH}f32"
        reduce = cgutils.get_or_insert_function(builder.module, max_type, name)
        return builder.call(reduce, [args[0]])
    return types.float32(lanes), generate


# 2^f on [-1/2, 1/2] with 2^0 = 1: the polynomial of least relative error, 9.2e-8.
_EXP2 = (1.0, 0.69314698, 0.24022242, 0.055507337, 0.0096715127, 0.0013264727)


@intrinsic
def exp2(typing, value):
    """2^x for x <= 126, with a relative error of 2e-7; below -126 it stays at 2^-126."""
    def generate(context, builder, signature, args):
        low = _const(builder, -126.0)
        x = builder.select(builder.fcmp_ordered("<", args[0], low), low, args[0])
        # Adding 1.5 * 2^23 leaves the nearest whole number in the low bits of the sum.
        magic = _const(builder, 12582912.0)
        shifted = builder.fadd(x, magic)
        f = builder.fsub(x, builder.fsub(shifted, magic))
        p = _const(builder, _EXP2[-1])
        for c in _EXP2[-2::-1]:
            p = builder.fadd(builder.fmul(p, f, flags=_FLAGS), _const(builder, c), flags=_FLAGS)
        exponent = builder.shl(builder.bitcast(shifted, _V32), _const(builder, 23))
        return builder.bitcast(builder.add(builder.bitcast(p, _V32), exponent), _VF)
    return lanes(lanes), generate


def _arithmetic(name, symbol):
    @intrinsic
    def compute(typing, a, b):
        def generate(context, builder, signature, args):
            return getattr(builder, name)(args[0], args[1], flags=_FLAGS)
        return lanes(lanes, lanes), generate

    @overload(symbol)
    def _(a, b):
        if isinstance(a, Lanes) and isinstance(b, Lanes):
            return lambda a, b: compute(a, b)
        return None


for _name, _symbol in (("fadd", operator.add), ("fsub", operator.sub), ("fmul", operator.mul),
                       ("fdiv", operator.truediv)):
    _arithmetic(_name, _symbol)


_LOG2E = np.float32(1.4426950408889634)


@numba.njit(inline="always")
def sigmoid(v):
    """1 / (1 + e^-v); below v = -69 it stays at 1e-30."""
    one = splat(np.float32(1))
    return one / (one + exp2(minimum(v * splat(-_LOG2E), splat(np.float32(100)))))


@numba.njit(inline="always")
def _log1p_unit(u):
    """log(1 + u) for u from 0 to 1, with a relative error of 3.3e-8: u times a polynomial."""
    q = splat(np.float32(0.00536482525))
    q = q * u + splat(np.float32(-0.0300657963))
    q = q * u + splat(np.float32(0.0792045425))
    q = q * u + splat(np.float32(-0.13753803))
    q = q * u + splat(np.float32(0.191536553))
    q = q * u + splat(np.float32(-0.248571638))
    q = q * u + splat(np.float32(0.333213226))
    q = q * u + splat(np.float32(-0.49999648))
    return u * (q * u + splat(np.float32(1)))


@numba.njit(inline="always")
def softplus(v):
    """log(1 + e^v) = max(v, 0) + log1p(e^-|v|), with a relative error of 2e-7."""
    zero = splat(np.float32(0))
    u = exp2(minimum(v, zero - v) * splat(_LOG2E))
    return maximum(v, zero) + _log1p_unit(u)


@numba.njit(inline="always")
def log1p(v):
    """log(1 + v) for 0 <= v < 1e38, with a relative error of 2e-7: the part up to v = 1, and the
    logarithm of (1 + v) / 2 beyond it."""
    one = splat(np.float32(1))
    rest = (one + maximum(v, one)) * splat(np.float32(0.5))
    beyond = exponent(rest) * splat(np.float32(0.6931471805599453))
    return _log1p_unit(minimum(v, one)) + (beyond + _log1p_unit(mantissa(rest) - one))


@numba.njit(fastmath=FAST, inline="always")
def pack(source, at, stride, steps, used, into, offset):
    """Copy `steps` rows of one vector of channels into a dense float32 scratch; lanes from `used`
    on get zero."""
    for t in range(steps):
        if used == WIDTH:
            store(into, offset + t * WIDTH, load(source, at + t * stride))
        else:
            for j in range(WIDTH):
                into[offset + t * WIDTH + j] = (
                    get(source, at + t * stride + j) if j < used else np.float32(0))


@numba.njit(fastmath=FAST, inline="always")
def unpack(scratch, offset, steps, used, target, at, stride):
    """The inverse of `pack`, dropping the lanes from `used` on."""
    for t in range(steps):
        if used == WIDTH:
            store(target, at + t * stride, load(scratch, offset + t * WIDTH))
        else:
            for j in range(used):
                put(target, at + t * stride + j, scratch[offset + t * WIDTH + j])


def flat(x: Tensor):
    """The memory of a tensor from its first to its last element, as a 1-D array, to be indexed
    with the tensor's own strides; float32 as it is, bfloat16 as uint16."""
    x = x.detach()
    if x.is_contiguous():
        line = x.view(-1)
    else:
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        line = x.as_strided((span,) if x.numel() else (0,), (1,))
    return (line.view(torch.uint16) if x.dtype == torch.bfloat16 else line).numpy()


def marks(reset: Tensor | None) -> np.ndarray:
    """Where documents begin, as loops read it: (B, T) uint8, without elements where there is no
    `reset`."""
    if reset is None:
        return np.zeros((0, 0), np.uint8)
    return reset.contiguous().view(torch.uint8).numpy()


def shares(rows: int, vectors: int, threads: int) -> int:
    """Into how many groups the vectors of a row are cut, so that rows times groups share out evenly
    over the threads."""
    return min(threads // math.gcd(rows, threads), vectors)
