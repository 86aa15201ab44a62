"""The window of an implicit filter, in one pass over memory each way."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, WIDTH, exp2, load, maximum, splat, store

_LOG2E = np.float32(1.4426950408889634)
_FLOOR = np.float32(-30)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def window(x, decay, unit, shift, y, length):
    """y_l = x_l (exp(-decay l unit) + shift), rows l of decay.size channels.

    The exponential is less by 2^-30 (1e-9), and zero where that would be negative: nothing
    denormal, which processors take a hundred times longer for, comes out, and filters end.
    """
    d = decay.size
    zero, floor, offset = splat(np.float32(0)), splat(_FLOOR), splat(np.float32(shift))
    tiny = exp2(floor)
    for row in numba.prange(length):
        rate = splat(-_LOG2E * np.float32(row * unit))
        for c in range(0, d, WIDTH):
            w = exp2(maximum(load(decay, c) * rate, floor)) - tiny
            store(y, row * d + c, load(x, row * d + c) * (maximum(w, zero) + offset))
