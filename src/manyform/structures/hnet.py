"""H-Net: chunks that are learned, and a network that runs once a chunk."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyform.contract import Cost, CostGrowth, Hint, Place, StateGrowth, add_loss, mixer
from manyform.errors import ManyformError
from manyform.linear import Linear
from manyform.ops.linear_scan import linear_scan
from manyform.state import State
from manyform.structures.composite import Composite, growth_of
from manyform.structures.ragged import advance, held, kept_first, latest, require_ragged


class HNetState(NamedTuple):
    """position: (batch,) int64, tokens since the row's document began; last: (batch, d_model), the
    input before; main: the state of the main network, which has seen the chunks; smooth: (batch,
    d_model), the smoothed output of the latest chunk."""

    position: Tensor
    last: Tensor
    main: State
    smooth: Tensor


@mixer("hnet")
class HNet(Composite):
    """Dynamic chunking (Hwang 2025, arXiv:2507.07955, section 2.2); what stands before it in the
    pattern is the paper's encoder, what stands behind it the decoder.

      p_t = (1 - cos(W_q x_t, W_k x_{t-1})) / 2, and 1 where a document begins      (eq. 4)
      a chunk begins at t where p_t >= 1/2; the main network reads x at these tokens alone
      s_k = P_k m_k + (1 - P_k) s_{k-1}, for its outputs m and the p of chunk k     (eq. 5)
      y_t = STE(c_t) s_{k(t)} + W_r x_t, with k(t) the chunk of t                   (eq. 6 to 9)

    c_t is p_t where a chunk begins and 1 - p_t elsewhere; STE is 1 going forward and passes c's
    gradient. The training loss gets `balance` times N / (N - 1) ((N - 1) F G + (1 - F)(1 - G))
    (eq. 10), F the share of tokens that begin a chunk and G the mean of p, which is least, and 1,
    at a share of 1 / N.

    main: pattern of the main network. ratio: the N, tokens a chunk. norm, residual: of its blocks.
    Whether a chunk begins depends on a token and the one before it, so that streaming is exact. In
    float32 always: another rounding could move a boundary.
    """

    exact_cost = False
    discrete = True

    def __init__(self, d_model: int, *, place: Place = Place(), main: str = "4 attention",
                 ratio: float = 6.0, balance: float = 0.03, norm: str = "rms",
                 residual: str = "pre") -> None:
        super().__init__(d_model, place=place, norm=norm, residual=residual)
        if not ratio > 1 or balance < 0:
            raise ManyformError("ratio of hnet is tokens a chunk and must be above 1, and balance "
                                f"at least 0; given: {ratio} and {balance}")
        self.ratio, self.balance = ratio, balance
        self.main = self.build_stack(main, "main network")
        require_ragged(self.main, self.name)
        self.query, self.key, self.skip = (Linear(d_model, d_model, bias=False)
                                           for _ in range(3))
        for layer in (self.query, self.key):  # similarity of the inputs themselves, at first
            nn.init.eye_(layer.weight)
        nn.init.zeros_(self.skip.weight)

    @property
    def growth(self) -> tuple[StateGrowth, CostGrowth]:
        """That of the main network."""
        return growth_of(self.main)

    def forward(self, x: Tensor, state: HNetState | None = None, *,
                reset: Tensor | None = None, shared: dict[str, Any] | None = None,
                ) -> tuple[Tensor, HNetState]:
        shared = {} if shared is None else shared
        batch, length, d = x.shape
        positions = self.positions(state, x, reset)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        last = x.new_zeros(batch, d, dtype=wide) if state is None else state.last
        smooth = torch.zeros_like(last) if state is None else state.smooth
        p = self._boundaries(x.to(wide), last).masked_fill(positions == 0, 1.0)
        begins = p >= 0.5
        chunks, after = advance(self.main, x, begins, None if state is None else state.main, reset,
                                shared)
        n = chunks.shape[1]
        weight = p.gather(1, kept_first(begins)[:, :n])
        # Behind a row's last chunk the weight is zero, so that its value stays.
        real = torch.arange(n, device=x.device) < begins.sum(1, keepdim=True)
        weight = weight.masked_fill(~real, 0)[..., None]
        ends = smooth
        if n:
            smoothed, ends = linear_scan((1 - weight).expand(-1, -1, d), weight * chunks.to(wide),
                                         smooth)
        else:
            smoothed = chunks.to(wide)
        c = torch.where(begins, p, 1 - p)[..., None]
        y = (c - c.detach() + 1) * held(smoothed, latest(begins), smooth) + self.skip(x)
        if length:
            share, mean, ratio = begins.to(wide).mean(), p.mean(), self.ratio
            add_loss(shared, "ratio", self.balance * ratio / (ratio - 1) * (
                (ratio - 1) * share * mean + (1 - share) * (1 - mean)))
            last = x[:, -1].to(wide)
        return y.to(x.dtype), HNetState(self.after(positions, state, x), last, after, ends)

    def _boundaries(self, x: Tensor, last: Tensor) -> Tensor:
        """p of each token, from x: (batch, length, d) and the input before: (batch, d)."""
        with torch.autocast(x.device.type, enabled=False):
            before = torch.cat([last[:, None], x], 1)[:, :x.shape[1]]
            return (1 - F.cosine_similarity(self.query(x), self.key(before), dim=-1)) / 2

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> HNetState:
        weight = self.query.weight
        device = weight.device if device is None else device
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        zeros = torch.zeros(batch_size, self.d_model, dtype=wide, device=device)
        return HNetState(torch.zeros(batch_size, dtype=torch.int64, device=device), zeros,
                         self.main.initial_state(batch_size, device=device), zeros.clone())

    def hints(self) -> Mapping[str, Hint]:
        plain = Hint(weight_decay=False)
        return {"query.weight": plain, "key.weight": plain, "skip.weight": plain}

    def cost(self, length: int) -> Cost:
        """Expected at the ratio."""
        return self._with(length, max(1, round(length / self.ratio)))

    def cost_limit(self, length: int) -> Cost:
        return self._with(length, length)

    def _with(self, length: int, chunks: int) -> Cost:
        own = Cost(6 * self.d_model**2 * length + 2 * self.d_model * chunks, 8 + 8 * self.d_model)
        return own + self.main.cost(chunks)
