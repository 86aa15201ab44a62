"""The hierarchical transformer: segments, a document of their summaries, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyform import state as states
from manyform.contract import Cost, CostGrowth, Place, StateGrowth, mixer
from manyform.errors import ManyformError
from manyform.linear import Linear
from manyform.stack import Stack
from manyform.state import State
from manyform.structures.composite import Composite, growth_of
from manyform.structures.ragged import advance, held, require_ragged


class HierarchicalState(NamedTuple):
    """position, segments: (batch,) int64, tokens and ended segments of the row's document; fresh:
    (batch,) bool, the next token begins a segment; encoder, decoder: states within the segment;
    document: state over the summaries; context: (batch, d_model), what it said last."""

    position: Tensor
    segments: Tensor
    fresh: Tensor
    encoder: State
    document: State
    decoder: State
    context: Tensor


@mixer("hierarchical_transformer")
class HierarchicalTransformer(Composite):
    """Sentence to document and back, causal: a document-level network sees one summary a segment,
    and what it makes of the segments so far goes into every token of the next.

      h = encoder(x), which sees its own segment       (the sentence transformer)
      o = document(h at the last token of each segment)
      y = decoder(h + W o_before), which sees its own segment and, through o, all before it

    The levels are those of HIBERT (Zhang 2019, arXiv:1905.06566, section 3.1), the way back to the
    tokens that of Hi-Transformer (Wu 2021, arXiv:2106.01040, section 2); here each level is causal,
    so that a summary is what its last token has seen, and a token gets the document as it stood
    when its segment began.

    segment: tokens of a segment, counted from the beginning of a document. delimiter: a token (its
      number) that ends a segment instead; `segment` is then the length that `cost` expects. Needs
      the tokens, and so a model.
    encoder, document, decoder: patterns. norm, residual: of their blocks.
    """

    def __init__(self, d_model: int, *, place: Place = Place(), segment: int = 32,
                 delimiter: int | None = None, encoder: str = "2 attention",
                 document: str = "2 attention", decoder: str = "2 attention", norm: str = "rms",
                 residual: str = "pre") -> None:
        super().__init__(d_model, place=place, norm=norm, residual=residual)
        if segment < 1:
            raise ManyformError(f"segment of hierarchical_transformer must be at least 1 token, "
                                f"not {segment}")
        self.segment, self.delimiter = segment, delimiter
        self.exact_cost = delimiter is None
        self.encoder = self.build_stack(encoder, "encoder")
        self.document = self.build_stack(document, "document network")
        self.decoder = self.build_stack(decoder, "decoder")
        require_ragged(self.document, self.name)
        self.reads_tokens = self.reads_tokens or delimiter is not None
        self.down = Linear(d_model, d_model, bias=False)
        nn.init.normal_(self.down.weight, std=0.02)

    @property
    def growth(self) -> tuple[StateGrowth, CostGrowth]:
        """That of the document network; segments bound the others, unless a delimiter ends them."""
        if self.delimiter is not None:
            return growth_of(self.encoder, self.document, self.decoder)
        state, cost = growth_of(self.document)
        return ("window" if state in ("none", "constant") else state), cost

    def forward(self, x: Tensor, state: HierarchicalState | None = None, *,
                reset: Tensor | None = None, shared: dict[str, Any] | None = None,
                ) -> tuple[Tensor, HierarchicalState]:
        shared = {} if shared is None else shared
        batch, length, _ = x.shape
        fold = state is None and reset is None and self.delimiter is None
        before = self.initial_state(batch, device=x.device) if state is None else state
        positions = self.positions(before, x, reset)
        ends = self._ends(positions, shared)
        starts = (positions == 0) | torch.cat([before.fresh[:, None], ends], 1)[:, :length]
        ended = ends.cumsum(1) - ends.long()  # in this call, before each token
        segments = _since_document(ended, positions == 0, before.segments)

        h, encoder = self._within(self.encoder, x, before.encoder, starts, fold, shared)
        told, document = advance(self.document, h, ends, None if state is None else state.document,
                                 segments == 0, shared)
        context = held(told, ended - 1, before.context)
        context = self.down(context).masked_fill((segments == 0)[..., None], 0)
        y, decoder = self._within(self.decoder, h + context, before.decoder, starts, fold, shared)
        if length == 0:
            return y, before
        said = held(told, ends.sum(1, keepdim=True) - 1, before.context)[:, 0]
        return y, HierarchicalState(
            self.after(positions, before, x), segments[:, -1] + ends[:, -1], ends[:, -1], encoder,
            document, decoder, said.to(before.context.dtype))

    def _ends(self, positions: Tensor, shared: dict[str, Any]) -> Tensor:
        """(batch, length) bool: the last tokens of segments."""
        if self.delimiter is None:
            return positions % self.segment == self.segment - 1
        if "tokens" not in shared:
            raise ManyformError("a delimiter ends segments by the tokens, which only a model "
                                "knows; use the mixer in a model, or without delimiter")
        return shared["tokens"] == self.delimiter

    def _within(self, stack: Stack, x: Tensor, state: State, starts: Tensor, fold: bool,
                shared: dict[str, Any]) -> tuple[Tensor, State]:
        """The stack within each segment. fold: whole segments of one length from the start, which
        are then rows of their own."""
        (batch, length, d), size = x.shape, self.segment
        full = length // size
        if not fold or full == 0:
            return stack(x, state, reset=starts, shared=shared)
        y, after = stack(x[:, :full * size].reshape(batch * full, size, d), None, shared=shared)
        y = y.view(batch, full * size, d)
        if full * size == length:
            last = torch.arange(full - 1, batch * full, full, device=x.device)
            return y, states.select(after, last)
        tail, after = stack(x[:, full * size:], None, shared=shared)
        return torch.cat([y, tail], 1), after

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> HierarchicalState:
        weight = self.down.weight
        device = weight.device if device is None else device
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(batch_size, dtype=torch.int64, device=device)
        encoder, document, decoder = (s.initial_state(batch_size, device=device)
                                      for s in (self.encoder, self.document, self.decoder))
        return HierarchicalState(
            zeros, zeros.clone(), torch.ones_like(zeros, dtype=torch.bool), encoder, document,
            decoder, torch.zeros(batch_size, self.d_model, dtype=wide, device=device))

    def cost(self, length: int) -> Cost:
        full, tail = divmod(length, self.segment)
        local = Cost(0, 0)
        for stack in (self.encoder, self.decoder):
            whole, rest = stack.cost(self.segment), stack.cost(max(tail, 1))
            local = local + Cost(full * whole.flops + (rest.flops if tail else 0),
                                 rest.state_bytes if tail else whole.state_bytes)
        return local + self._above(length, full)

    def cost_limit(self, length: int) -> Cost:
        """With a delimiter: one segment of all tokens, or as many segments as tokens."""
        if self.delimiter is None:
            return self.cost(length)
        return self.encoder.cost(length) + self.decoder.cost(length) + self._above(length, length)

    def _above(self, length: int, segments: int) -> Cost:
        """What the document network costs, and the way down."""
        document = self.document.cost(segments) if segments else Cost(0, states.nbytes(
            self.document.initial_state(1, device="meta")))
        return document + Cost(2 * self.d_model**2 * length, 17 + 4 * self.d_model)


def _since_document(counts: Tensor, begins: Tensor, before: Tensor) -> Tensor:
    """counts: (batch, length), rising from 0 over a call; begins: where documents begin; before:
    (batch,), what the first document had already -> counts since each token's document began."""
    steps = torch.arange(counts.shape[1], device=counts.device)
    start = torch.where(begins, steps, -1).cummax(dim=1).values
    base = counts.gather(1, start.clamp(min=0))
    return torch.where(start >= 0, counts - base, before[:, None] + counts)
