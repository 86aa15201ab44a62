"""Pseudo-random order without a generator: pure functions of (seed, index)."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = np.arange(1, 7, dtype=np.uint64) * _GOLDEN


def key_of(seed: int, purpose: str) -> NDArray[np.uint64]:
    """(1,) uint64, independent for each seed (any whole number) and purpose."""
    digest = hashlib.sha256(f"{purpose}:{seed}".encode()).digest()
    return np.frombuffer(digest[:8], dtype="<u8").astype(np.uint64)


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit numbers whose every output bit depends on every input bit: the
    finaliser of splitmix64 (Steele, Lea and Flood 2014)."""
    x = (x + _GOLDEN).astype(np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: NDArray[Any], size: int, key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where a pseudo-random permutation of 0..size-1 sends each index.

    index: any shape, below `size`. key: 64 bits that choose the permutation, broadcast against
    index. A Feistel network (Luby and Rackoff 1988) permutes the next even power of two; what falls
    outside is sent on until it falls inside (cycle walking, Black and Rogaway 2002).
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    x = np.atleast_1d(np.asarray(index)).astype(np.uint64)
    keys = np.broadcast_to(key, x.shape)
    outside = np.ones(x.shape, dtype=bool)
    while outside.any():
        y, k = x[outside], keys[outside]
        left, right = y >> half, y & mask
        for constant in _ROUNDS:
            left, right = right, left ^ (mix(right ^ mix(k + constant)) & mask)
        x[outside] = (left << half) | right
        outside = x >= size
    return x.astype(np.int64)
