"""The recurrence of linear attention, retention, gated and delta-rule networks: a matrix state."""

from __future__ import annotations

import torch
from torch import Tensor

from manyform.ops.operation import operation


def _flops(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None,
           erase: tuple[Tensor, Tensor] | None = None, state: Tensor | None = None,
           reset: Tensor | None = None, scale: float = 1.0) -> int:
    batch, length, heads, value = v.shape
    per_step = k.shape[-1] * value * (4 + (1 if log_decay is not None else 0)
                                      + (4 if erase is not None else 0))
    return batch * length * heads * per_step


@operation(flops=_flops)
def matrix_recurrence(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None,
                      erase: tuple[Tensor, Tensor] | None = None, state: Tensor | None = None,
                      reset: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(g_t)) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,   y_t = scale * S_t^T q_t.

    One equation for the family (Yang 2024, "Parallelizing Linear Transformers with the Delta
    Rule", table 4; Peng 2025, RWKV-7, eq. 17):
      no decay              linear attention     g = 0
      decay a head          retention            g: (H,)
      decay a head, step    mamba2, gated delta  g: (B, T, H)
      decay a channel       gla, rwkv7           g: (B, T, H, K)
      erase (a, b)          delta rule           b = beta k, a = -exp(g) k

    q, k: (B, T, G, K) with G heads that divide H (each serves H / G heads, in order);
    v: (B, T, H, V); log_decay g <= 0: None or one of the shapes above; erase: None or (a, b), each
    (B, T, G, K) or (B, T, H, K); state S: (B, H, K, V) or None (zeros); reset: (B, T) bool, true
    where S_{t-1} is forgotten.
    Returns y: (B, T, H, V) in the dtype of v, and S after the last step in float32 (float64 for
    float64 input); everything is accumulated there.
    """
    batch, length, heads, value = v.shape
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32

    def per_head(x: Tensor) -> Tensor:
        return x.to(wide).repeat_interleave(heads // x.shape[2], dim=2)

    q_, k_, v_ = per_head(q), per_head(k), v.to(wide)
    s = v_.new_zeros(batch, heads, k.shape[-1], value) if state is None else state.to(wide)
    a_, b_ = (per_head(erase[0]), per_head(erase[1])) if erase is not None else (None, None)
    ys = []
    for t in range(length):
        if reset is not None:
            s = torch.where(reset[:, t, None, None, None], torch.zeros_like(s), s)
        kept = s
        if log_decay is not None:
            g = log_decay if log_decay.ndim == 1 else log_decay[:, t]
            ones = [1] * (4 - g.ndim if g.ndim > 1 else 2)
            kept = s * g.to(wide).exp().reshape(*g.shape, *ones)
        if a_ is not None and b_ is not None:
            kept = kept + b_[:, t, :, :, None] * (a_[:, t, :, :, None] * s).sum(2, keepdim=True)
        s = kept + k_[:, t, :, :, None] * v_[:, t, :, None, :]
        ys.append(scale * (q_[:, t, :, :, None] * s).sum(2))
    y = torch.stack(ys, dim=1) if ys else v_.new_zeros(batch, 0, heads, value)
    return y.to(v.dtype), s


from manyform.ops import chunked_decay, chunked_delta  # noqa: E402, F401  (fast forms)
