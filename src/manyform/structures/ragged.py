"""Running a stack over some tokens of each row: the rest of its state stands still.

Rows keep different numbers of tokens, so that what the stack sees is ragged. Its state must end
behind the last kept token of every row, and not behind filling.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyform import state as states
from manyform.errors import ManyformError
from manyform.stack import Stack
from manyform.state import State

Run = Callable[..., tuple[Tensor, State]]
"""(x, state, reset=...) -> (y, state): a stack with everything else that its call takes."""


def advance(stack: Stack, x: Tensor, keep: Tensor, state: State, reset: Tensor | None,
            shared: dict[str, Any], final_norm: nn.Module | None = None) -> tuple[Tensor, State]:
    """The stack (and `final_norm`) over the kept tokens of each row.

    x: (batch, length, d); keep: (batch, length) bool; reset: (batch, length) bool, looked at where
    a token is kept. Returns (batch, n, d), the outputs of each row's kept tokens from the left,
    zeros behind them, with n the most that a row keeps; and the state after each row's last.
    """
    counts = keep.sum(1)
    most, least = (int(c) for c in (counts.max(), counts.min()))
    if most == 0:
        if state is None:
            state = stack.initial_state(x.shape[0], device=x.device)
        return x[:, :0], state
    order = kept_first(keep)[:, :most]
    kept = _columns(x, order)
    marks = None if reset is None else reset.gather(1, order)
    if least == most:
        return stack(kept, state, reset=marks, shared=shared, final_norm=final_norm)
    run = partial(stack, shared=shared, final_norm=final_norm)
    real = torch.arange(most, device=x.device) < counts[:, None]
    kept = kept.masked_fill(~real[..., None], 0)
    if state is None and least > 0:
        return _from_the_right(run, kept, counts, marks, real)
    if state is None:
        state = stack.initial_state(x.shape[0], device=x.device)
    return _in_steps(run, kept, counts, state, marks)


def _from_the_right(run: Run, kept: Tensor, counts: Tensor, marks: Tensor | None, real: Tensor,
                    ) -> tuple[Tensor, State]:
    """At the start of a sequence: one call, every row flush right, the filling before it cut off by
    a reset at its first token."""
    most = kept.shape[1]
    columns = torch.arange(most, device=kept.device)
    filling = (most - counts)[:, None]
    order = (columns - filling) % most
    reset = columns == filling
    if marks is not None:
        reset = reset | (marks & real).gather(1, order)
    y, state = run(_columns(kept, order), None, reset=reset)
    y = _columns(y, (columns + filling) % most)
    return y.masked_fill(~real[..., None], 0), state


def _in_steps(run: Run, kept: Tensor, counts: Tensor, state: State, marks: Tensor | None,
              ) -> tuple[Tensor, State]:
    """Chunks that end wherever a row ends, each with the rows that go on: no filling at all."""
    batch, most, _ = kept.shape
    live = torch.arange(batch, device=kept.device)
    places, pieces, rows, ended, begin = [], [], [], [], 0
    for level in sorted(set(counts.tolist())):
        if level > begin:
            y, state = run(kept[live, begin:level], state,
                           reset=None if marks is None else marks[live, begin:level])
            places.append((live[:, None] * most + torch.arange(begin, level,
                                                               device=live.device)).flatten())
            pieces.append(y.flatten(0, 1))
            begin = level
        finished = counts[live] == level
        rows.append(live[finished])
        ended.append(states.select(state, finished))
        live, state = live[~finished], states.select(state, ~finished)
    flat = kept.new_zeros(batch * most, pieces[0].shape[1], dtype=pieces[0].dtype)
    flat = flat.index_copy(0, torch.cat(places), torch.cat(pieces))
    back = torch.cat(rows).argsort()
    return flat.view(batch, most, -1), states.select(_join(ended), back)


def _join(trees: list[State]) -> State:
    """Rows of states whose tensors may have grown by different lengths: shorter ones are filled up
    with zeros at the front, where `aligned` mixers look at nothing."""
    def join(*tensors: Tensor) -> Tensor:
        size = [max(n) for n in zip(*(t.shape[1:] for t in tensors), strict=True)]
        filled = [F.pad(t, [n for want, has in zip(reversed(size), reversed(t.shape[1:]),
                                                   strict=True) for n in (want - has, 0)])
                  if list(t.shape[1:]) != size else t for t in tensors]
        return torch.cat(filled)
    return states.map_tensors(join, *trees)


def require_ragged(stack: Stack, name: str) -> None:
    """Refuse a stack that cannot run over some tokens of a row, or whose states cannot be joined
    row by row. Raises ManyformError."""
    for mixer in (block.mixer for block in stack.layers):
        if mixer.reads_tokens:
            raise ManyformError(f"{mixer.name} reads the tokens themselves, and in {name} a stack "
                                "sees some of a row's tokens only, or vectors that are none")
        if not (mixer.aligned or mixer.growth[0] in ("none", "constant")):
            raise ManyformError(
                f"{name} advances each row by itself, and the growing state of {mixer.name} cannot "
                "be joined from rows of different lengths; use attention or a mixer with a state "
                "of constant size")


def kept_first(keep: Tensor) -> Tensor:
    """The order that puts the kept tokens of each row to the left: (batch, length) int64."""
    return keep.to(torch.int8).argsort(dim=1, descending=True, stable=True)


def latest(keep: Tensor) -> Tensor:
    """For each token the index among its row's kept ones of the latest, itself or before it; -1
    where there is none: (batch, length) int64."""
    return keep.cumsum(1) - 1


def held(values: Tensor, slot: Tensor, before: Tensor) -> Tensor:
    """values: (batch, n, d) of kept tokens; slot: as `latest` gives; before: (batch, d), what is
    held where slot is -1 -> (batch, length, d)."""
    if values.shape[1] == 0:
        return before[:, None].expand(-1, slot.shape[1], -1).to(values.dtype)
    found = _columns(values, slot.clamp(min=0))
    return torch.where(slot[..., None] < 0, before[:, None].to(values.dtype), found)


def _columns(x: Tensor, index: Tensor) -> Tensor:
    """x: (batch, n, d); index: (batch, m) -> (batch, m, d)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
