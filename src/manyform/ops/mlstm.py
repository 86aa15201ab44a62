"""The matrix memory of the mLSTM: exponential gates, a normaliser, a stabiliser."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from manyform.ops.gates import scale_heads
from manyform.ops.kernel_average import weighted_sums
from manyform.ops.operation import operation

SMALL = 1 << 15
"""Elements of v below which bfloat16 input is computed in float32: the quotient magnifies rounding,
and small products gain nothing from bfloat16."""


class Memory(NamedTuple):
    """matrix: (B, H, K, V + 1), exp(-m) times the memory C and, as its last column, the normaliser
    n. m: (B, H), the stabiliser. Both zero before the first step."""

    matrix: Tensor
    m: Tensor


def _flops(q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, state: Memory | None = None,
           reset: Tensor | None = None, eps: float = 0.0) -> int:
    return 5 * k.numel() * (v.shape[-1] + 1)


@operation(flops=_flops)
def mlstm(q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, state: Memory | None = None,
          reset: Tensor | None = None, eps: float = 0.0) -> tuple[Tensor, Memory]:
    """C_t = f_t C_{t-1} + i_t k_t v_t^T,  n_t = f_t n_{t-1} + i_t k_t,
    h_t = C_t^T q_t / max(|n_t . q_t|, 1),  q scaled by 1/sqrt(K)

    with i = exp(i~), f = exp(log f) (Beck 2024, "xLSTM", eq. 19 to 27). Both are kept times
    exp(-m), m_t = max(log f_t + m_{t-1}, i~_t) (eq. 15), which changes nothing but their range:

        C' = e^{log f + m - m'} C + e^{i~ - m'} k v^T,
        h = C'^T q / (max(|n' . q|, e^{-m'}) + eps)

    q, k: (B, T, H, K); v: (B, T, H, V); i~, log f <= 0: (B, T, H); reset: (B, T) bool, true where
    a document begins. eps: 1e-6 in the released code, which makes m felt a little.
    Returns h: (B, T, H, V) in the dtype of v, and the memory after the last step in float32
    (float64 for float64 input).
    """
    batch, length, heads, value = v.shape
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    matrix, m = _start(q, v, state)
    q_, k_, ones = q.to(wide) * q.shape[-1] ** -0.5, k.to(wide), v.new_ones(batch, heads, 1)
    hs = []
    for t in range(length):
        if reset is not None:
            matrix = torch.where(reset[:, t, None, None, None], 0.0, matrix)
            m = torch.where(reset[:, t, None], 0.0, m)
        forget, write = log_f[:, t].to(wide), i[:, t].to(wide)
        after = torch.maximum(forget + m, write)
        row = torch.cat([v[:, t], ones], dim=-1).to(wide)
        matrix = ((forget + m - after).exp()[..., None, None] * matrix
                  + (write - after).exp()[..., None, None] * k_[:, t, :, :, None] * row[:, :, None])
        m = after
        read = (q_[:, t, :, :, None] * matrix).sum(2)
        size = torch.maximum(read[..., -1:].abs(), (-m).exp()[..., None]) + eps
        hs.append(read[..., :-1] / size)
    return torch.stack(hs, dim=1).to(v.dtype), Memory(matrix, m)


@mlstm.path("recurrence")
def _(q: Tensor, k: Tensor, v: Tensor, i: Tensor, log_f: Tensor, state: Memory | None = None,
      reset: Tensor | None = None, eps: float = 0.0) -> tuple[Tensor, Memory]:
    """The stabiliser of all steps first: then this is linear attention with a decay a head, of
    at most 1 as m' >= log f + m, whose values end in a one.

    What h is does not depend on m, except through eps. So m is a constant to the gradient, and the
    small share of eps is added.
    """
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    matrix, m0 = _start(q, v, state)
    m, before = _stabiliser(i.double(), log_f.double(), m0.double(), reset)
    fixed = m.detach()
    decay = (log_f.double() + (before.detach() - fixed)).to(wide)
    write = (i.double() - fixed).exp().to(wide)
    dtype = v.dtype
    if v.numel() < SMALL:
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
    sums, weights, matrix = weighted_sums(q, scale_heads(k, write), v, decay, matrix, reset,
                                          q.shape[-1] ** -0.5)
    size = torch.maximum(weights.abs(), (-fixed).exp().to(wide))
    if eps:
        size = size + eps * (m - fixed).exp().to(wide)
    h = scale_heads(sums, size.reciprocal()).to(dtype)
    return h, Memory(matrix, m[:, -1].to(wide))


def _stabiliser(i: Tensor, log_f: Tensor, m0: Tensor, reset: Tensor | None,
                ) -> tuple[Tensor, Tensor]:
    """m of every step and of the step before it (zero where a document begins), (B, T, H) float64.

    With F_t the sum of log f up to t, m_t - F_t = max(m_{t-1} - F_{t-1}, i_t - F_t): a running
    maximum. Documents are kept apart by lifting each above all that came before.
    """
    total = log_f.cumsum(1)
    x = i - total
    first = m0 if reset is None else torch.where(reset[:, :1], 0.0, m0)
    x = torch.cat([torch.maximum(x[:, :1], first[:, None]), x[:, 1:]], dim=1)
    if reset is None:
        m = total + x.cummax(1).values
        return m, torch.cat([m0[:, None], m[:, :-1]], dim=1)
    x = torch.where(reset[..., None], torch.maximum(x, log_f - total), x)
    with torch.no_grad():
        lift = reset.cumsum(1)[..., None] * (x.amax(1) - x.amin(1) + 1)[:, None]
    m = total + (x + lift).cummax(1).values - lift
    before = torch.cat([m0[:, None], m[:, :-1]], dim=1)
    return m, torch.where(reset[..., None], 0.0, before)


def _start(q: Tensor, v: Tensor, state: Memory | None) -> Memory:
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state is not None:
        return Memory(state.matrix.to(wide), state.m.to(wide))
    batch, _, heads, value = v.shape
    matrix = torch.zeros(batch, heads, q.shape[-1], value + 1, dtype=wide, device=v.device)
    return Memory(matrix, matrix.new_zeros(batch, heads))
