"""Tree-structured composition, read from left to right."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyform.contract import Cost, Hint, Place, SequenceMixer, mixer
from manyform.errors import ManyformError
from manyform.init import linear, residual_std
from manyform.ops.shift_reduce import shift_reduce


class TreeState(NamedTuple):
    """stack: (batch, depth, 2 d_model) float32, the hidden and cell states of the constituents that
    are open, the outermost first; open: (batch,) int64, how many there are."""

    stack: Tensor
    open: Tensor


@mixer("tree")
class Tree(SequenceMixer):
    """A TreeLSTM over a binary tree, built on a stack while the tokens come (see `shift_reduce`):
    every token is a leaf, every output what the innermost open constituent, and the one around it,
    have come to.

    open, close: tokens (their numbers) that begin and end a constituent, if the tree is given by
      brackets: within one, leaves and constituents are composed from the left, as in ListOps
      (Nangia 2018, arXiv:1804.06028). Needs the tokens, and so a model. None: the tree is induced;
      two learned scores decide at every token, with straight-through gradients.
    depth: constituents that are kept apart; what lies deeper is composed without its brackets.

    Causal: an output composes what has been read; at the last bracket that is the whole tree.
    """

    shares = True

    def __init__(self, d_model: int, *, place: Place = Place(),
                 open: int | Sequence[int] | None = None,
                 close: int | Sequence[int] | None = None, depth: int = 16) -> None:
        super().__init__(d_model, place=place)
        if (open is None) != (close is None):
            raise ManyformError("a tree is given by both open and close brackets, or by neither")
        if depth < 2:
            raise ManyformError(f"depth of tree must be at least 2, not {depth}")
        self.open, self.close = (None if x is None else [x] if isinstance(x, int) else list(x)
                                 for x in (open, close))
        self.depth, self.discrete, self.reads_tokens = depth, open is None, open is not None
        self.leaf = linear(d_model, 2 * d_model, bias=True, std=1 / math.sqrt(d_model))
        bound = 1 / math.sqrt(2 * d_model)
        self.weight = nn.Parameter(torch.empty(5 * d_model, 2 * d_model).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(5 * d_model))
        with torch.no_grad():  # remember at first, as LSTMs do (Jozefowicz 2015)
            self.bias[d_model:3 * d_model] = 1.0
        if self.discrete:
            self.score = nn.Parameter(torch.empty(2, 2 * d_model).normal_(std=bound))
            self.score_bias = nn.Parameter(torch.zeros(2))
        self.out = linear(2 * d_model, d_model, std=residual_std(place))

    def forward(self, x: Tensor, state: TreeState | None = None, *, reset: Tensor | None = None,
                shared: dict[str, Any] | None = None) -> tuple[Tensor, TreeState]:
        before = self.initial_state(x.shape[0], device=x.device) if state is None else state
        if x.shape[1] == 0:
            return x, before
        given = None if self.open is None else self._brackets(shared or {}, x)
        score = (self.score, self.score_bias) if self.discrete else None
        y, stack, depth = shift_reduce(self.leaf(x), self.weight, self.bias, before.stack,
                                       before.open, given, score, reset)
        return self.out(y.to(x.dtype)), TreeState(stack, depth)

    def _brackets(self, shared: Mapping[str, Any], x: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each token joins the constituent, and whether it then ends it."""
        if "tokens" not in shared:
            raise ManyformError("brackets are tokens, which only a model knows; use tree in a "
                                "model, or without open and close")
        tokens = shared["tokens"]
        opens, closes = (torch.isin(tokens, torch.tensor(kind, device=x.device))
                         for kind in (self.open, self.close))
        return ~opens, closes

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> TreeState:
        device = self.weight.device if device is None else device
        wide = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        return TreeState(torch.zeros(batch_size, self.depth, 2 * self.d_model, dtype=wide,
                                     device=device),
                         torch.zeros(batch_size, dtype=torch.int64, device=device))

    def hints(self) -> Mapping[str, Hint]:
        return {"score": Hint(weight_decay=False)} if self.discrete else {}

    def cost(self, length: int) -> Cost:
        """Leaves, two compositions a token, and the way out."""
        matrices = self.leaf.weight.numel() + 2 * self.weight.numel() + self.out.weight.numel()
        return Cost(2 * matrices * length, 8 * self.depth * self.d_model + 8)
