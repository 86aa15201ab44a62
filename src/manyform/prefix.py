"""Learned tokens in front of every document, which everything behind them reads and none writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyform.errors import ManyformError
from manyform.stack import Stack
from manyform.state import State
from manyform.structures.ragged import advance, require_ragged


class Prefix(nn.Module):
    """`tokens` learned vectors before the first token of every document: Hymba's meta tokens (Dong
    2024, arXiv:2411.13676, section 2.3), the persistent memory of Titans (Behrouz 2025,
    arXiv:2501.00663, eq. 19). They pass through all layers and have no outputs of their own.

    The state of a stack that has read none of a document is that before the prefix, so that a row
    is given its prefix in the call that has its first token.
    """

    def __init__(self, tokens: int, d_model: int, std: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens, d_model).normal_(std=std))

    def forward(self, stack: Stack, x: Tensor, begins: Tensor, state: State, *,
                shared: dict[str, Any], final_norm: nn.Module) -> tuple[Tensor, State]:
        """The stack over x, (batch, length, d), with the prefix before every token of `begins`,
        (batch, length) bool; see `Stack`. A row's state is forgotten where its document begins."""
        batch, length, d = x.shape
        count = len(self.weight)
        if not bool(begins.any()):
            return stack(x, state, shared=shared, final_norm=final_norm)
        prefix = self.weight.to(x.dtype).expand(batch, -1, -1)
        if state is None and not bool(begins[:, 1:].any()):
            h, after = stack(torch.cat([prefix, x], 1), shared=shared, final_norm=final_norm)
            return h[:, count:], after
        steps = torch.arange(length, device=x.device)
        place = steps + count * begins.cumsum(1)  # of each token among its row's, prefixes included
        total = length + count * begins.sum(1)
        row, first = begins.nonzero(as_tuple=True)
        opening = place[row, first] - count  # of each document's prefix
        source = place.new_zeros(batch, int(total.max()))
        source.scatter_(1, place, steps.expand(batch, -1))
        within = torch.arange(count, device=x.device)
        source[row[:, None], opening[:, None] + within] = length + within
        reset = torch.zeros_like(source, dtype=torch.bool)
        reset[row, opening] = True
        whole = torch.cat([x, prefix], 1).gather(1, source[..., None].expand(-1, -1, d))
        keep = torch.arange(source.shape[1], device=x.device) < total[:, None]
        h, after = advance(stack, whole, keep, state, reset, shared, final_norm=final_norm)
        return h.gather(1, place[..., None].expand(-1, -1, h.shape[-1])), after


def require_prefix(stack: Stack) -> None:
    """Refuse a stack that learned tokens cannot stand before. Raises ManyformError."""
    for mixer in (block.mixer for block in stack.layers):
        if not mixer.causal:
            raise ManyformError(f"prefix_tokens needs causal mixers, and {mixer.name} looks ahead")
    require_ragged(stack, "prefix_tokens")
