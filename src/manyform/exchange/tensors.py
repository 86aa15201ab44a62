"""How a checkpoint's tensors lie in ours: the same, turned, joined, or in groups; both ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manyform.block import Block
from manyform.model import Model

Sizes = Callable[[Any], Sequence[int]]


@dataclass(frozen=True)
class Layout:
    """One of our tensors from some of theirs, and back.

    names: theirs, within the layer, without the ending that ours has beyond its rule (".weight").
    into: (theirs, block) -> ours; back: (ours, block) -> theirs. Both only move elements, so that
    what is read and written again has the same bits. also: further parameters of ours that lie in
    the same tensors of theirs; `into` then gives, and `back` takes, a list.
    """

    names: tuple[str, ...]
    into: Callable[[list[Tensor], Any], Any] = lambda parts, block: parts[0]
    back: Callable[[Any, Any], list[Tensor]] = lambda whole, block: [whole]
    also: tuple[str, ...] = ()


def joined(*names: str, sizes: Sizes) -> Layout:
    """Theirs, one after the other along the first dimension. sizes: of a block, rows of each."""
    return Layout(names, lambda parts, block: torch.cat(parts),
                  lambda whole, block: list(whole.split(list(sizes(block)))))


def turned(name: str) -> Layout:
    """Matrices transposed (GPT-2's input-major maps); vectors as they are."""
    return Layout((name,), lambda parts, block: parts[0].t() if parts[0].ndim == 2 else parts[0],
                  lambda whole, block: [whole.t() if whole.ndim == 2 else whole])


def taps(name: str) -> Layout:
    """A depthwise convolution's (channels, 1, taps) as (channels, taps)."""
    return Layout((name,), lambda parts, block: parts[0].squeeze(1),
                  lambda whole, block: [whole.unsqueeze(1)])


def qkv(*names: str) -> Layout:
    """Queries, keys and values of attention, a tensor each."""
    return joined(*names, sizes=qkv_sizes)


def qkv_sizes(block: Block) -> list[int]:
    """Rows of attention's queries, keys and values."""
    a: Any = block.mixer
    return [a.n_heads * a.head_dim, a.kv_heads * a.head_dim, a.kv_heads * a.head_dim]


def grouped_qkv(name: str) -> Layout:
    """One tensor in groups of a key head: its query heads, the key, the value (GPT-NeoX, Falcon).
    """
    def into(parts: list[Tensor], block: Any) -> Tensor:
        a = block.mixer
        x = parts[0].reshape(a.kv_heads, -1, a.head_dim, *parts[0].shape[1:])
        return torch.cat([part.flatten(0, 2) for part in (x[:, :-2], x[:, -2:-1], x[:, -1:])])

    def back(whole: Tensor, block: Any) -> list[Tensor]:
        a = block.mixer
        x = [part.reshape(a.kv_heads, -1, a.head_dim, *whole.shape[1:])
             for part in whole.split(qkv_sizes(block))]
        return [torch.cat(x, dim=1).flatten(0, 2)]
    return Layout((name,), into, back)


def gate_up(gate: str, up: str) -> Layout:
    """The two input maps of a gated MLP."""
    return joined(gate, up, sizes=lambda block: [block.channel.down.in_features] * 2)


def shaped(name: str, theirs: Callable[[Any], Sequence[int]], ours: Sequence[int] = (-1,),
           ) -> Layout:
    """The same elements in another shape. theirs: their shape, of a block."""
    return Layout((name,), lambda parts, block: parts[0].reshape(tuple(ours)),
                  lambda whole, block: [whole.reshape(tuple(theirs(block)))])


Rule = str | Layout | Callable[[Any], "str | Layout"]
Rules = Mapping[str, Rule]
"""By the beginning of our parameters' names: where they lie, or a function of the block."""


@dataclass(frozen=True)
class Place:
    """Where some of our parameters lie in a checkpoint. ours, theirs: names in full; block: the
    block they stand in, or None."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout
    block: Block | None

    def read(self, parts: list[Tensor]) -> list[Tensor]:
        """Ours, from theirs."""
        made = self.layout.into(parts, self.block)
        return list(made) if self.layout.also else [made]

    def write(self, own: Mapping[str, Tensor]) -> list[Tensor]:
        """Theirs, from ours by name."""
        wholes = [own[name] for name in self.ours]
        return self.layout.back(wholes if self.layout.also else wholes[0], self.block)

    def shapes(self, own: Mapping[str, Tensor]) -> list[tuple[int, ...]]:
        """The shapes of theirs."""
        like = {name: torch.empty(own[name].shape, device="meta") for name in self.ours}
        return [tuple(t.shape) for t in self.write(like)]


_USE = re.compile(r"(.+?)\.uses\.(\d+)\.(.+)")


def places(model: Model, top: Rules, block: Rules, layer: str) -> list[Place]:
    """The places of all parameters, tied ones once; KeyError for a parameter without a rule.

    top: rules by the names of our parameters, or the beginnings of them. block: those within a
    block; a rule for "attention:mixer_norm" holds where the block's mixer is attention, one for
    "parallel:mixer_norm" where that is the model's `residual`. layer: their name of layer "{i}",
    with which the names of `block` begin (unless they begin with a slash). Layers that share their
    weights lie where the first of them does, except for what is one use's own, "mixer.uses.3.x":
    that lies in the layer of this use, by the rule for "mixer.uses.x", in which "{first}" stands
    for the first of those layers and "{rank}" for this layer's among all that share weights.
    """
    found: list[Place] = []
    done: set[str] = set()
    stack, order = model.blocks.layers, model.blocks.order
    for name in dict(model.named_parameters()):
        if name in done:
            continue
        head, _, rest = name.partition(".")
        begin, where, owner = "", "", None
        rules, inner = top, name
        tags: tuple[str, ...] = ()
        numbers: dict[str, int] = {}
        if head == "blocks":
            number, _, inner = rest.partition(".")
            users = [i for i, used in enumerate(order) if used == int(number)]
            i = users[0]
            begin, owner = f"blocks.{number}.", stack[i]
            rules, tags = block, (model.config.layers[i].mixer, model.config.residual)
            use = _USE.fullmatch(inner)
            if use:
                inner, i = f"{use[1]}.uses.{use[3]}", users[int(use[2])]
                shared = [n for n, spec in enumerate(model.config.layers) if spec.share is not None]
                numbers = {"first": users[0], "rank": shared.index(i) if i in shared else 0}
            where = layer.format(i=i)
        rule, ending = _match(inner, rules, tags, owner)
        ours = (name, *(begin + also for also in rule.also))
        theirs = tuple((n[1:] if n.startswith("/") else where + n) + ending for n in rule.names)
        if numbers:
            theirs = tuple(n.format(**numbers) for n in theirs)
        done.update(ours)
        found.append(Place(ours, theirs, rule, owner))
    return found


def _match(name: str, rules: Rules, tags: tuple[str, ...], block: Block | None,
           ) -> tuple[Layout, str]:
    """The rule with the longest beginning of `name`, and what is left of the name."""
    pieces = name.split(".")
    for n in range(len(pieces), 0, -1):
        begin = ".".join(pieces[:n])
        for key in (*(f"{tag}:{begin}" for tag in tags), begin):
            if key in rules:
                rule = rules[key]
                if callable(rule):
                    rule = rule(block)
                ending = "".join(f".{piece}" for piece in pieces[n:])
                return (Layout((rule,)) if isinstance(rule, str) else rule), ending
    raise KeyError(name)
