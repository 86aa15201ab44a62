"""An operation is three things side by side: the equation, a plain reference, and fast forms.

    @operation(flops=lambda x, w: 2 * x.numel() * w.shape[0])
    def product(x, w):
        '''y = x w^T (Author 1999, eq. 1). ...'''          # the equation
        return ...                                            # the reference, obviously right

    @product.path("numba", when=lambda x, w: x.device.type == "cpu")
    def _(x, w): ...                                          # a fast form

Calling `product(x, w)` takes the applicable form registered last, and the reference if there is
none. Which form ran is always known (`trace`), can be chosen (`use`), and the operations that the
equation needs can be counted (`count`).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from manyform.errors import ManyformError, unknown

_registry: dict[str, Operation] = {}
_traces: list[Counter[tuple[str, str]]] = []
_forced: ContextVar[Mapping[str, str]] = ContextVar("forced", default=MappingProxyType({}))
_counters: list[FlopCount] = []


class Operation:
    """A reference function with named fast forms, tried from the last registered to the first."""

    def __init__(self, reference: Callable[..., Any], flops: Callable[..., int]) -> None:
        self.name = reference.__name__
        self.reference = reference
        self.flops = flops
        self._paths: dict[str, tuple[Callable[..., Any], Callable[..., bool]]] = {}
        functools.update_wrapper(self, reference)
        if self.name in _registry:
            raise ValueError(f"an operation named {self.name!r} exists already")
        _registry[self.name] = self

    def path(self, name: str, *, when: Callable[..., bool] = lambda *a, **k: True) -> Callable:
        """Register a fast form; `when` gets the call's arguments and says whether it applies."""
        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            self._paths[name] = (function, when)
            return function
        return register

    @property
    def paths(self) -> list[str]:
        """Names of all forms, the preferred one first, the reference last."""
        return [*reversed(self._paths), "reference"]

    def choose(self, *args: Any, **kwargs: Any) -> str:
        """The name of the form that a call with these arguments would take."""
        forced = _forced.get()
        wanted = forced.get(self.name, forced.get("*"))
        if wanted == "reference":
            return wanted
        if wanted in self._paths:
            if not self._paths[wanted][1](*args, **kwargs):
                raise ManyformError(f"the {wanted!r} path of {self.name} does not apply to these "
                                    "arguments; remove the use(...) that asks for it")
            return wanted
        if self.name in forced:
            raise unknown(f"path of {self.name}", wanted, self.paths)
        for name in reversed(self._paths):
            if self._paths[name][1](*args, **kwargs):
                return name
        return "reference"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = self.choose(*args, **kwargs)
        for seen in _traces:
            seen[self.name, name] += 1
        function = self.reference if name == "reference" else self._paths[name][0]
        if not _counters:
            return function(*args, **kwargs)
        counters, paused = list(_counters), [c.paused for c in _counters]
        for counter in counters:
            if not counter.paused:
                counter.add(self.name, self.flops(*args, **kwargs))
            counter.paused = True
        try:
            return function(*args, **kwargs)
        finally:
            for counter, was in zip(counters, paused, strict=True):
                counter.paused = was


def operation(*, flops: Callable[..., int]) -> Callable[[Callable[..., Any]], Operation]:
    """Make an operation of its reference.

    `flops` gets the call's arguments and returns the floating-point operations that the equation
    needs (a multiply-add is two), whichever form computes it.
    """
    return lambda reference: Operation(reference, flops)


def operations() -> dict[str, Operation]:
    """Every operation that has been imported, by name."""
    return dict(_registry)


@contextmanager
def trace() -> Iterator[Counter[tuple[str, str]]]:
    """Collect which forms run: a counter keyed by (operation, path)."""
    seen: Counter[tuple[str, str]] = Counter()
    _traces.append(seen)
    try:
        yield seen
    finally:
        _traces[:] = [t for t in _traces if t is not seen]


@contextmanager
def use(every: str | None = None, /, **paths: str) -> Iterator[None]:
    """Choose forms: `use("reference")` for every operation that has one of that name, or
    `use(selective_scan="reference")` for one. Raises ManyformError for an unknown operation."""
    for name in paths:
        if name not in _registry:
            raise unknown("operation", name, _registry)
    token = _forced.set({**_forced.get(), **({"*": every} if every else {}), **paths})
    try:
        yield
    finally:
        _forced.reset(token)


class FlopCount(TorchDispatchMode):
    """Counts matrix products and convolutions, and each operation by what its equation needs.

    Pointwise work (norms, activations, gates) is not counted, as is the custom of the field.
    """

    def __init__(self) -> None:
        super().__init__()
        self.paused = False
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.by_name.values())

    def add(self, name: str, flops: int) -> None:
        self.by_name[name] += int(flops)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = getattr(func, "_overloadpacket", None)
        if not self.paused and packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.add(func.__name__.split(".")[0], flops)
        return out

    def __enter__(self) -> FlopCount:
        _counters.append(self)
        return super().__enter__()

    def __exit__(self, *exc: Any) -> None:
        _counters[:] = [c for c in _counters if c is not self]
        super().__exit__(*exc)


def count() -> FlopCount:
    """`with count() as c: model(x)`, then `c.total` is the number of forward operations."""
    return FlopCount()
