"""Loss and gradient of softmax cross-entropy, row by row, in place of the logits."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.lanes import (
    FAST,
    WIDTH,
    exp2,
    get,
    largest,
    load,
    maximum,
    put,
    splat,
    store,
    total,
)

_LOG2E = np.float32(1.4426950408889634)


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def loss_and_gradient(logits, targets, ignore, vocab, losses):
    """losses[i] = logsumexp(row i) - row[target]; the row becomes softmax - one-hot, or zeros
    where the target is `ignore`."""
    whole = vocab - vocab % WIDTH
    for row in numba.prange(targets.size):
        base, target = row * vocab, targets[row]
        top = splat(np.float32(-3e38))
        for j in range(0, whole, WIDTH):
            top = maximum(load(logits, base + j), top)
        peak = largest(top)
        for j in range(whole, vocab):
            peak = max(peak, get(logits, base + j))
        chosen = get(logits, base + target) if target != ignore else np.float32(0)
        scale, shift = splat(_LOG2E), splat(peak)
        norm = splat(np.float32(0))
        for j in range(0, whole, WIDTH):
            norm = norm + exp2((load(logits, base + j) - shift) * scale)
        z = total(norm)
        for j in range(whole, vocab):
            z += np.exp(get(logits, base + j) - peak)
        if target == ignore:
            losses[row] = 0
            for j in range(vocab):
                put(logits, base + j, np.float32(0))
            continue
        losses[row] = np.log(z) + peak - chosen
        share = splat(np.float32(1) / z)
        for j in range(0, whole, WIDTH):
            store(logits, base + j, exp2((load(logits, base + j) - shift) * scale) * share)
        for j in range(whole, vocab):
            put(logits, base + j, np.float32(np.exp(get(logits, base + j) - peak) / z))
        p = np.exp(chosen - peak) / z
        put(logits, base + target, np.float32(p - np.float32(1)))
