"""A state is a value: a tree of tensors, batch first. These plain functions serve every state.

A tree is a tensor, None, a number, or a dict, list, tuple or NamedTuple of trees. No function here
changes its argument.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from manyform.errors import ManyformError

State = Any
"""A tree of tensors, batch first."""


def map_tensors(function: Callable[..., Any], *trees: State) -> State:
    """Apply `function` to the tensors that stand at the same place of every tree."""
    first = trees[0]
    if isinstance(first, Tensor):
        return function(*trees)
    if isinstance(first, dict):
        return {key: map_tensors(function, *(t[key] for t in trees)) for key in first}
    if isinstance(first, tuple | list):
        if any(len(t) != len(first) for t in trees):
            raise ManyformError("states of different structure cannot be combined: "
                                f"lengths {[len(t) for t in trees]}")
        parts = [map_tensors(function, *group) for group in zip(*trees, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    return first


def tensors(tree: State) -> Iterator[Tensor]:
    """Every tensor of the tree, in a fixed order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from tensors(value)
    elif isinstance(tree, tuple | list):
        for value in tree:
            yield from tensors(value)


def nbytes(tree: State) -> int:
    """Bytes that the state's elements take (spare capacity behind a view is not counted)."""
    return sum(t.numel() * t.element_size() for t in tensors(tree))


def batch_size(tree: State) -> int:
    """Rows of the state; raises ManyformError where it holds no tensor."""
    for t in tensors(tree):
        return t.shape[0]
    raise ManyformError("a state without tensors has no batch size")


def select(tree: State, rows: Tensor | Sequence[int]) -> State:
    """The given rows (indices or a boolean mask), in that order, repeats allowed."""
    def pick(t: Tensor) -> Tensor:
        index = torch.as_tensor(rows, device=t.device)
        return t[index]
    return map_tensors(pick, tree)


def join(trees: Sequence[State]) -> State:
    """Rows of several states of one shape, one after the other."""
    return map_tensors(lambda *ts: torch.cat(ts, dim=0), *trees)


def detach(tree: State) -> State:
    """The same values, cut off from the graph (truncated backpropagation)."""
    return map_tensors(torch.Tensor.detach, tree)


def clone(tree: State) -> State:
    """A deep copy."""
    return map_tensors(torch.clone, tree)


def to(tree: State, *args: Any, **kwargs: Any) -> State:
    """Moved or cast as `Tensor.to` does; integer tensors keep their dtype under a float dtype."""
    dtype = kwargs.get("dtype") or next((a for a in args if isinstance(a, torch.dtype)), None)

    def move(t: Tensor) -> Tensor:
        if dtype is not None and dtype.is_floating_point and not t.is_floating_point():
            rest = [a for a in args if not isinstance(a, torch.dtype)]
            options = {k: v for k, v in kwargs.items() if k != "dtype"}
            return t.to(*rest, **options) if rest or options else t
        return t.to(*args, **kwargs)
    return map_tensors(move, tree)


def equal(a: State, b: State) -> bool:
    """The same structure, shapes, dtypes and bits (NaN equals NaN)."""
    left, right = list(tensors(a)), list(tensors(b))
    return _skeleton(a) == _skeleton(b) and all(
        x.shape == y.shape and x.dtype == y.dtype and torch.equal(
            torch.nan_to_num(x), torch.nan_to_num(y)) and torch.equal(x.isnan(), y.isnan())
        for x, y in zip(left, right, strict=True))


def save(tree: State, path: str | Path) -> None:
    """Write the state's tensors and shape-of-tree as one safetensors file."""
    from safetensors.torch import save_file
    flat = {str(i): t.detach().clone().contiguous() for i, t in enumerate(tensors(tree))}
    save_file(flat, str(path), metadata={"tree": json.dumps(_skeleton(tree))})


def load(path: str | Path, like: State) -> State:
    """Read a saved state into the structure of `like` (for example `model.initial_state(1)`).

    Raises ManyformError where the file is missing, unreadable, or of another structure.
    """
    from safetensors import safe_open
    try:
        with safe_open(str(path), framework="pt") as file:
            tree = (file.metadata() or {}).get("tree", "")
            parts = [file.get_tensor(str(i)) for i in range(len(file.keys()))]
    except Exception as error:
        raise ManyformError(f"cannot read a state from {path}: {error}") from error
    if json.loads(tree or "null") != json.loads(json.dumps(_skeleton(like))):
        raise ManyformError(f"the state in {path} belongs to another model: its structure differs "
                            "from this model's initial state")
    it = iter(parts)
    return map_tensors(lambda _: next(it), like)


def _skeleton(tree: State) -> Any:
    """The tree's structure as JSON values; a tensor becomes its dtype's name."""
    if isinstance(tree, Tensor):
        return f"tensor:{str(tree.dtype).removeprefix('torch.')}"
    if isinstance(tree, dict):
        return {str(k): _skeleton(v) for k, v in tree.items()}
    if isinstance(tree, tuple | list):
        return [_skeleton(v) for v in tree]
    return tree
