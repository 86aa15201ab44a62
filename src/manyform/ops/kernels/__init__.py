"""Loops compiled for the CPU by numba; modules here are imported only when a path needs them.

Threads. Torch runs its own loops on an OpenMP pool whose workers spin for milliseconds after each
loop. A second pool would have to share the cores with those spinning workers (measured on two
cores, alternating a 0.3 ms loop with torch operations: numba's workqueue layer and a pool of
Python threads each lost 30%). numba's OpenMP layer loses nothing: torch loads its OpenMP library
into the process's global namespace, numba's layer resolves to the same one, and both work on one
pool. So the OpenMP layer comes first here, and the others serve where it is missing. A process
that has used OpenMP must not use it again after a fork, so in a forked child (not a spawned one)
the torch forms serve.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("numba") is not None


def available() -> bool:
    """True if compiled loops can run here: numba is installed and this is no forked process."""
    return _installed() and not _forked


def usable(*tensors: Tensor | None) -> bool:
    """True if a compiled loop can serve these tensors: numba is here and all lie on the CPU."""
    return available() and all(t is None or t.device.type == "cpu" for t in tensors)


def single(*tensors: Tensor | None) -> bool:
    """True if every floating-point tensor is float32 or bfloat16, which `lanes` can load."""
    return all(t is None or t.dtype in (torch.float32, torch.bfloat16)
               or not t.is_floating_point() for t in tensors)


def dense(x: Tensor) -> Tensor:
    """x itself where its last dimension is dense, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def even_rows(x: Tensor) -> Tensor:
    """x (B, T, D) itself where all its rows are dense and lie at one distance, else a copy."""
    even = x.stride(-1) == 1 and (len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1))
    return x if even else x.contiguous()


def threads() -> int:
    """Give numba as many threads as torch uses, and say how many; call it before each loop."""
    import numba
    count = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if numba.get_num_threads() != count:
        numba.set_num_threads(count)
    return count


@dataclass
class Compiling:
    """seconds: spent in compiling loops; what an earlier process compiled is loaded in no time."""

    seconds: float = 0.0


@contextmanager
def compiling() -> Iterator[Compiling]:
    """Measures what the loops that are used inside take to compile; known at the end."""
    spent = Compiling()
    if not available():
        yield spent
        return
    from numba.core.event import TimingListener, install_listener
    with install_listener("numba:compile", TimingListener()) as listener:
        yield spent
    spent.seconds = listener.duration if listener.done else 0.0


def _prefer_openmp() -> None:
    order = "omp tbb workqueue"
    os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", order)
    if "numba" in sys.modules:  # it has read the environment already
        sys.modules["numba"].config.THREADING_LAYER_PRIORITY = order.split()


_prefer_openmp()
