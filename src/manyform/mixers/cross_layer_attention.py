"""Attention whose keys and values several layers share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from manyform.contract import Cost, CostGrowth, Place, StateGrowth, mixer
from manyform.errors import ManyformError
from manyform.init import linear
from manyform.mixers.attention import Attention, AttentionState, Seen


@mixer("cross_layer_attention")
class CrossLayerAttention(Attention):
    """Attention that lends its keys and values, or borrows those of the last such layer before it
    in the stack (Brandon 2024, arXiv:2405.12981, "Reducing Transformer Key-Value Cache Size with
    Cross-Layer Attention", section 2; Hymba shares by twos).

    borrows: False: as `attention`. True: the layer has queries alone, turned by the positions of
      the lender's, and no state.
    The other options are those of attention; heads of keys, head_dim, window and sinks must be the
    lender's.
    """

    shares = True

    def __init__(self, d_model: int, *, place: Place = Place(), borrows: bool = False,
                 n_heads: int | None = None, head_dim: int | None = None,
                 kv_heads: int | None = None, kv_groups: int | None = None,
                 window: int | None = None, sinks: int = 0, qk_norm: bool | str = False,
                 position: str = "rotary", rope_base: float = 10000.0) -> None:
        super().__init__(d_model, place=place, n_heads=n_heads, head_dim=head_dim,
                         kv_heads=kv_heads, kv_groups=kv_groups, window=window, sinks=sinks,
                         qk_norm=qk_norm, position=position, rope_base=rope_base)
        self.borrows = borrows
        if borrows:
            self.qkv, self.k_norm = linear(d_model, self.n_heads * self.head_dim), None

    @property
    def growth(self) -> tuple[StateGrowth, CostGrowth]:
        """That of attention; the state is the lender's."""
        state, cost = super().growth
        return ("none" if self.borrows else state), cost

    def forward(self, x: Tensor, state: AttentionState | None = None, *,  # type: ignore[override]
                reset: Tensor | None = None, shared: dict[str, Any] | None = None,
                ) -> tuple[Tensor, AttentionState | None]:
        """As attention's. Raises ManyformError where there is nothing to borrow, or nothing
        that fits."""
        shared = {} if shared is None else shared
        if self.borrows:
            return self._borrow(x, shared), None
        q, seen, after = self.see(self.qkv(x), state, reset)
        shared["lent"] = seen, self.window, self.sinks
        return self.result(x, q, seen), after

    def _borrow(self, x: Tensor, shared: dict[str, Any]) -> Tensor:
        if "lent" not in shared:
            raise ManyformError("cross_layer_attention(borrows=True) reads the keys and values of "
                                "a cross_layer_attention before it, and there is none here")
        seen: Seen
        seen, *reach = shared["lent"]
        theirs = (seen.keys.shape[1], seen.keys.shape[3], *reach)
        own = (self.kv_heads, self.head_dim, self.window, self.sinks)
        if own != theirs:
            raise ManyformError("cross_layer_attention must borrow from a layer of the same "
                                "kv_heads, head_dim, window and sinks; its own are "
                                f"{own}, the lender's {theirs}")
        q = self.qkv(x).view(*x.shape[:2], self.n_heads, self.head_dim)
        if self.q_norm is not None:
            q = self.q_norm(q)
        return self.result(x, self.turn(q, seen.positions).transpose(1, 2), seen)

    def initial_state(  # type: ignore[override]
            self, batch_size: int, *, device: Any = None) -> AttentionState | None:
        """None for a layer that borrows."""
        return None if self.borrows else super().initial_state(batch_size, device=device)

    def deepnorm_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        if self.borrows:
            return [self.out.weight], [self.qkv.weight]
        return super().deepnorm_weights()

    def cost(self, length: int) -> Cost:
        """Attention's, without projections of keys and values and without their bytes."""
        cost = super().cost(length)
        return Cost(cost.flops, 0) if self.borrows else cost
