"""log(sigmoid(x)) times a factor in one pass over memory each way."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, WIDTH, load, sigmoid, softplus, splat, store


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(x, y, factor):
    minus = np.float32(-factor)
    for i in numba.prange(x.size // WIDTH):
        v = splat(np.float32(0)) - load(x, i * WIDTH)
        store(y, i * WIDTH, softplus(v) * splat(minus))


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(g, x, dx, factor):
    """dx = factor g sigmoid(-x)."""
    scale = np.float32(factor)
    for i in numba.prange(x.size // WIDTH):
        v = splat(np.float32(0)) - load(x, i * WIDTH)
        store(dx, i * WIDTH, load(g, i * WIDTH) * sigmoid(v) * splat(scale))
