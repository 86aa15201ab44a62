"""The sum of a float32 stream and a bfloat16 branch in one pass over memory."""

from __future__ import annotations

import numba

from manyform.ops.kernels.lanes import FAST, WIDTH, load, store


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def add(x, y, out):
    for i in numba.prange(x.size // WIDTH):
        store(out, i * WIDTH, load(x, i * WIDTH) + load(y, i * WIDTH))
