"""A linear map of bfloat16 features by float32 weights, on matrix tiles (see `panels`).

W = W_1 + W_2, both bfloat16, is W to 16 bits; the sum of both products stays in float32.
"""

from __future__ import annotations

import numba

from manyform.ops.kernels.lanes import FAST, WIDTH, load, store
from manyform.ops.kernels.panels import SIDE, multiply, read
from manyform.ops.kernels.tiles import SHAPE, configure, release


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(x, tokens, d, outputs, block, panels, bias, y, floats, halves):
    """y, flat rows of `outputs` float32; panels: of B = W_1^T, then of B = W_2^T; floats, halves:
    scratch, a row a worker."""
    steps, squares, panel = d // SIDE, block // SIDE, d * 2 * SIDE
    blocks, workers = (tokens + block - 1) // block, floats.shape[0]
    for worker in numba.prange(workers):
        configure(SHAPE.ctypes.data)
        c, own = floats[worker], halves[worker]
        for n in range(worker * blocks // workers, (worker + 1) * blocks // workers):
            first = n * block
            count = min(block, tokens - first)
            read(x, first, count, block, d, own)
            for j in range(outputs // SIDE):
                for part in range(2):
                    at = panels.ctypes.data + (part * (outputs // SIDE) + j) * panel
                    multiply(c.ctypes.data, part == 0, own.ctypes.data, panel, at, 0, squares, 1,
                             steps)
                for t in range(count):
                    to = (first + t) * outputs + j * SIDE
                    for k in range(0, SIDE, WIDTH):
                        store(y, to + k, load(c, t * SIDE + k) + load(bias, j * SIDE + k))
        release()


def scratch(d, block):
    """Sizes of one worker's floats and halves."""
    return block * SIDE, block * d
