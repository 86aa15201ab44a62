"""Zamba2: Mamba-2 layers, some of which also hear one Transformer block that they share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from manyform.channels.mlp import GatedMLP
from manyform.contract import Cost, Place, SequenceMixer, mixer
from manyform.errors import ManyformError
from manyform.init import linear, residual_std
from manyform.mixers.attention import Attention, AttentionState
from manyform.mixers.mamba2 import Mamba2, Mamba2State
from manyform.norms import RMSNorm


class Zamba2State(NamedTuple):
    """The states of attention and of Mamba-2."""

    attention: AttentionState | None
    mamba: Mamba2State | None


class LowRank(nn.Module):
    """x W_down W_up, zero at the start: what one use adds to a map that several share."""

    def __init__(self, d_in: int, d_out: int, rank: int) -> None:
        super().__init__()
        self.down = linear(d_in, rank)
        self.up = linear(rank, d_out, std=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., d_in) -> (..., d_out)."""
        return self.up(self.down(x))

    def flops(self) -> int:
        """For one token."""
        return 2 * (self.down.weight.numel() + self.up.weight.numel())


class Use(nn.Module):
    """What is a layer's own: its additions to the shared block, the map out of it, Mamba-2."""

    def __init__(self, attention: Attention, mlp: GatedMLP, mamba: Mamba2, rank: int,
                 adapt_attention: bool, eps: float) -> None:
        super().__init__()
        wide, d = attention.d_model, mlp.d_model
        narrow = attention.kv_heads * attention.head_dim
        self.q, self.k, self.v = (LowRank(wide, n, rank) if adapt_attention else None
                                  for n in (wide, narrow, narrow))
        self.gate_up = LowRank(d, 2 * mlp.width, rank)
        self.out = linear(d, d, std=residual_std(mamba.place))
        self.norm = RMSNorm(d, eps=eps)
        self.mamba = mamba

    def qkv(self, x: Tensor) -> Tensor | None:
        """The additions to queries, keys and values."""
        if self.q is None or self.k is None or self.v is None:
            return None
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


@mixer("zamba2")
class Zamba2(SequenceMixer):
    """y = x + mamba2(norm(x + W mlp(norm(attention(norm([x; e])))))), e what entered the stack:
    the layers of Zamba2 that hear its shared block (Glorioso 2024, arXiv:2411.15242, section 2 and
    figure 2; Glorioso 2024, "Zamba", arXiv:2405.16712, eq. 6; released code).

    Layers that share their weights ("zamba2 + none @ shared") have one attention, of width 2
    d_model, and one gated MLP between them, neither with a residual sum of its own; a layer's own
    are low-rank additions to the input maps of both, the map W, Mamba-2, and its norm. Alone, or as
    the first layer of a stack, e is x.

    n_heads, kv_heads, position ("rotary" or "none"), rope_base, rope_scaling: as in attention, over
    2 d_model features; scores are divided by sqrt(head_dim / 2). width, expansion, activation: of
    the MLP. rank: of the additions (None: a sixteenth of d_model, at most the published 128);
    adapt_attention: also to queries, keys and values, not only to the MLP. d_state, expand,
    head_dim, n_groups, conv_size, dt_limit: of Mamba-2. bias: on the
    maps of the MLP and of Mamba-2. norm_eps: of the norms of the stream.
    """

    state_growth = "linear"
    cost_growth = "quadratic"
    aligned = True
    bare = True
    shares = True

    def __init__(self, d_model: int, *, place: Place = Place(), n_heads: int | None = None,
                 kv_heads: int | None = None, position: str = "rotary",
                 rope_base: float = 10000.0, rope_scaling: Mapping[str, Any] | None = None,
                 width: int | None = None, expansion: float = 4.0, activation: str = "gelu",
                 rank: int | None = None, adapt_attention: bool = True, d_state: int = 64,
                 expand: float = 2.0, head_dim: int | None = None, n_groups: int = 1,
                 conv_size: int = 4, dt_limit: tuple[float, float] | None = None,
                 bias: bool = False, norm_eps: float = 1e-5) -> None:
        super().__init__(d_model, place=place)
        rank = min(128, max(1, d_model // 16)) if rank is None else rank
        if rank < 1:
            raise ManyformError(f"rank of zamba2 must be at least 1, not {rank}")
        if position not in ("rotary", "none"):
            raise ManyformError(f"position of zamba2 must be 'rotary' or 'none', not {position!r}")
        self.rank, self.adapt_attention, self.norm_eps = rank, adapt_attention, norm_eps
        self.activation = activation
        self.attention_norm = RMSNorm(2 * d_model, eps=norm_eps)
        self.attention = Attention(2 * d_model, place=place, n_heads=n_heads, kv_heads=kv_heads,
                                   position=position, rope_base=rope_base,
                                   rope_scaling=rope_scaling)
        self.attention.scale = math.sqrt(2 / self.attention.head_dim)
        self.attention.out = linear(2 * d_model, d_model, std=residual_std(place))
        self.mlp_norm = RMSNorm(d_model, eps=norm_eps)
        self.mlp = GatedMLP(d_model, place=place, width=width, expansion=expansion,
                            activation=activation, bias=bias)
        self.uses = nn.ModuleList(
            Use(self.attention, self.mlp, Mamba2(
                d_model, place=place, d_state=d_state, expand=expand, head_dim=head_dim,
                n_groups=n_groups, conv_size=conv_size, dt_limit=dt_limit, bias=bias),
                rank, adapt_attention, norm_eps) for _ in range(place.uses))

    def forward(self, x: Tensor, state: Zamba2State | None = None, *,
                reset: Tensor | None = None, shared: dict[str, Any] | None = None,
                ) -> tuple[Tensor, Zamba2State]:
        """x: (batch, length, d_model), the stream -> the new stream, and the state."""
        shared = {} if shared is None else shared
        use = self._use(shared)
        before = Zamba2State(None, None) if state is None else state
        entrance = shared.get("entrance")
        h = self.attention_norm(torch.cat([x, x if entrance is None else entrance], dim=-1))
        qkv, more = self.attention.qkv(h), use.qkv(h)
        h, attention = self.attention.attend(h, qkv if more is None else qkv + more,
                                             before.attention, reset)
        h = self.mlp_norm(h)
        heard = use.out(self.mlp.gated(self.mlp.gate_up(h) + use.gate_up(h)))
        y, mamba = use.mamba(use.norm(x + heard), before.mamba, reset=reset)
        return x + y, Zamba2State(attention, mamba)

    def _use(self, shared: dict[str, Any]) -> Use:
        if len(self.uses) > 1 and "use" not in shared:
            raise ManyformError("a zamba2 layer whose weights are shared must stand in the stack "
                                "itself, not inside of another mixer")
        return self.uses[shared.get("use", 0)]  # type: ignore[return-value]

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None,
                      ) -> Zamba2State:
        return Zamba2State(self.attention.initial_state(batch_size, device=device),
                           self.uses[0].mamba.initial_state(  # type: ignore[operator, union-attr]
                               batch_size, device=device))

    def cost(self, length: int) -> Cost:
        """Of one layer: the shared block, its additions, the map out of it, Mamba-2."""
        use = self._use({"use": 0})
        added = [part for part in (use.q, use.k, use.v, use.gate_up) if part is not None]
        own = 2 * use.out.weight.numel() + sum(part.flops() for part in added)
        return (self.attention.cost(length) + self.mlp.cost(length) + use.mamba.cost(length)
                + Cost(own * length, 0))
