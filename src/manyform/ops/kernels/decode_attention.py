"""One decoding step of softmax attention, from norm to residual, over owned caches."""

from __future__ import annotations

import numba
import numpy as np

from manyform.ops.kernels.attention_step import _add, _scores, _weights
from manyform.ops.kernels.decode import SUMS, normalise, product
from manyform.ops.kernels.lanes import FAST, WIDTH

SHARED = 1 << 17
"""Elements of keys that all heads read from which they are shared out among the threads."""


@numba.njit(fastmath=SUMS, cache=True)
def _place(source, at, d, norm_weight, eps, cos, sin, position, target, to):
    """One head's query or key, normalised and turned, to target[to:]."""
    scale = np.float32(1)
    if norm_weight.size:
        square = np.float32(0)
        for j in range(d):
            square += source[at + j] * source[at + j]
        scale /= np.sqrt(square / np.float32(d) + np.float32(eps))
    for j in range(d):
        target[to + j] = source[at + j] * scale
    if norm_weight.size:
        for j in range(d):
            target[to + j] *= norm_weight[j]
    if cos.size:
        half = d // 2
        for j in range(half):
            a, b = target[to + j], target[to + half + j]
            c, s = cos[position, j], sin[position, j]
            target[to + j] = a * c - b * s
            target[to + half + j] = b * c + a * s


@numba.njit(fastmath=FAST, cache=True)
def _head(h, q, keys, values, first_keys, first_values, per_group, length, end, window, scale,
          slope, d, y):
    """y[h] for a query that is token `length` of its document and whose key lies at `end`."""
    g, room = h // per_group, keys.shape[2]
    k, v = keys.reshape(-1), values.reshape(-1)
    at = g * keys.shape[1] * room
    near = max(0, length + 1 - window)  # the first token inside the window
    low, high = end - (length - near), end + 1
    slots, first_at = min(first_keys.shape[1], near), g * first_keys.shape[1] * room
    scores = np.empty(slots + high - low + WIDTH, np.float32)
    n = _scores(q, h * room, first_keys.reshape(-1), first_at, room, room, 0, slots, scale, slope,
                length, scores, 0)
    n = _scores(q, h * room, k, at, room, room, low, high, scale, slope, length - near, scores, n)
    inverse = np.float32(1) / _weights(scores, n)
    out = np.zeros(room, np.float32)
    n = _add(first_values.reshape(-1), first_at, room, room, 0, slots, scores, 0, out)
    _add(v, at, room, room, low, high, scores, n, out)
    for j in range(d):
        y[h * d + j] = out[j] * inverse


@numba.njit(parallel=True, cache=True)
def _heads_shared(heads, q, keys, values, first_keys, first_values, per_group, length, end, window,
                  scale, slopes, d, y):
    for h in numba.prange(heads):
        _head(h, q, keys, values, first_keys, first_values, per_group, length, end, window, scale,
              slopes[h], d, y)


@numba.njit(cache=True)
def attention(stream, residual, norm, norm_weight, norm_bias, eps, qkv, qkv_bias, out, out_bias,
              q_norm, k_norm, head_eps, cos, sin, slopes, window, scale, d, keys, values,
              first_keys, first_values, length, end, x, projected, q, y, threads):
    """stream (+)= W_out attention(norm(stream)); the new key and value go to place `end`.

    keys, values: (kv_heads, capacity, d rounded up to 16); first_keys, first_values the same with
    the first tokens of the document. length: tokens of the document before this one. scale and
    slopes (one a head) are those of exponents to base 2.
    """
    heads, groups = slopes.size, keys.shape[0]
    normalise(stream, norm, norm_weight, norm_bias, eps, x)
    product(qkv, x, qkv_bias, projected, False, threads)
    room = keys.shape[2]
    for h in range(heads):
        _place(projected, h * d, d, q_norm, head_eps, cos, sin, length, q, h * room)
    for g in range(groups):
        _place(projected, (heads + g) * d, d, k_norm, head_eps, cos, sin, length, keys[g, end], 0)
        values[g, end, :d] = projected[(heads + groups + g) * d:(heads + groups + g + 1) * d]
        if length < first_keys.shape[1]:
            first_keys[g, length] = keys[g, end]
            first_values[g, length] = values[g, end]
    seen = min(length + 1, window + first_keys.shape[1])
    if threads > 1 and seen * heads * room >= SHARED:
        _heads_shared(heads, q, keys, values, first_keys, first_values, heads // groups, length,
                      end, window, scale, slopes, d, y)
    else:
        for h in range(heads):
            _head(h, q, keys, values, first_keys, first_values, heads // groups, length, end,
                  window, scale, slopes[h], d, y)
    product(out, y, out_bias, stream, residual, threads)
