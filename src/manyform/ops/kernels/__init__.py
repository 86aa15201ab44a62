"""Loops compiled for the CPU by numba; modules here are imported only when a path needs them."""

from __future__ import annotations

import functools
import importlib.util

from torch import Tensor


@functools.cache
def available() -> bool:
    """True if numba can be imported; without it the torch forms serve."""
    return importlib.util.find_spec("numba") is not None


def usable(*tensors: Tensor | None) -> bool:
    """True if a compiled loop can serve these tensors: numba is here and all lie on the CPU."""
    return available() and all(t is None or t.device.type == "cpu" for t in tensors)
