"""The fast form of `matrix_recurrence` without the delta rule: chunks, as matrix products.

A chunk of C steps with the state S before it, c_i the sum of log decays from the chunk's first
step to step i, b = c_C (Yang 2024, "Gated Linear Attention", section 4; Dao & Gu 2024, section 6):

    y_i = (q_i e^{c_i})^T S + sum_{j <= i} (q_i . k_j e^{c_i - c_j}) v_j        "inter" + "intra"
    S'  = e^b S + sum_j (k_j e^{b - c_j}) v_j^T

so the work is a few batched products, and only S passes from chunk to chunk. Three ways to get
e^{c_i - c_j}, each exact within rounding:

  factored  e^{c_i - r} e^{r - c_j} with r = b / 2, while b keeps both factors far from overflow.
            For a decay a channel the factors scale q and k. For a decay a head they scale y and v,
            and heads that share q and k then share their scores.
  pairs     a C x C matrix of e^{c_i - c_j}, for a decay a head of any strength
  levels    for a decay a channel of any strength: the triangle of pairs is cut in halves, again and
            again; in each square, rows and columns are measured from the step between them, so
            that no factor exceeds 1
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops.matrix_recurrence import matrix_recurrence

CHUNK = 64
SMALL = 1 << 15  # elements of v
# e^-55 of a gradient of 1e-9 is still a normal float32 or bfloat16, e^55 of anything sane finite.
WIDEST = 110.0
# exp(-104) is 0 in float32, exp(-746) in float64: a stronger decay cannot be told from these.
STRONGEST = {torch.float32: -104.0, torch.float64: -746.0}


def _without_erase(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None,
                   erase: tuple[Tensor, Tensor] | None = None, state: Tensor | None = None,
                   reset: Tensor | None = None, scale: float = 1.0) -> bool:
    return erase is None and v.shape[1] > 0


def _one_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None,
              erase: tuple[Tensor, Tensor] | None = None, state: Tensor | None = None,
              reset: Tensor | None = None, scale: float = 1.0) -> bool:
    return erase is None and v.shape[1] == 1


@matrix_recurrence.path("chunked", when=_without_erase)
def chunked(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, erase: None = None,
            state: Tensor | None = None, reset: Tensor | None = None, scale: float = 1.0,
            ) -> tuple[Tensor, Tensor]:
    """Whole chunks at once; products in the dtype of v, or autocast's, states in float32."""
    batch, length, heads, value = v.shape
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    compute = v.dtype
    if compute == torch.float32 and torch.is_autocast_enabled(v.device.type):
        compute = torch.get_autocast_dtype(v.device.type)
    # float16 has too small a range for the factors, and small products gain nothing from bfloat16
    if compute == torch.float16 or (wide == torch.float32 and v.numel() < SMALL):
        compute = torch.float32
    size = min(CHUNK, 1 << (length - 1).bit_length())
    pad = -length % size
    g = log_decay
    if g is not None:
        g = g.to(wide)
        g = g.expand(1, length, heads) if g.ndim == 1 else g
        if reset is not None:  # what a reset forgets needs no decay, and must not strain the range
            g = torch.where(reset.reshape(*reset.shape, *[1] * (g.ndim - 2)), 0.0, g)
    if pad:  # steps that add nothing and forget nothing
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, pad)) for x in (q, k, v))
        g = None if g is None else F.pad(g, (0, 0) * (g.ndim - 2) + (0, pad))
        reset = None if reset is None else F.pad(reset, (0, pad))
    form = "factored"
    if g is not None:
        size, form = _choose(g.detach(), size)
        if form != "factored":
            g = g.clamp(min=STRONGEST[wide])
    if form != "factored" or (g is not None and g.ndim == 4):
        q, k = _per_head(q, heads), _per_head(k, heads)
    if state is None:
        state = torch.zeros(batch, heads, k.shape[-1], value, dtype=wide, device=v.device)
    y, last = _Chunked.apply(q, k, v, g, state.to(wide), reset, scale, size, form, compute)
    return (y[:, :length] if pad else y), last


@matrix_recurrence.path("step", when=_one_step)
def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, erase: None = None,
         state: Tensor | None = None, reset: Tensor | None = None, scale: float = 1.0,
         ) -> tuple[Tensor, Tensor]:
    """One token, for decoding: few calls matter more than few operations."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    heads = v.shape[2]
    q, k = _per_head(q, heads), _per_head(k, heads)
    s = k[:, 0, :, :, None].to(wide) * v[:, 0, :, None, :].to(wide)
    if state is not None:
        kept = state.to(wide)
        if reset is not None:
            kept = torch.where(reset[:, 0, None, None, None], 0.0, kept)
        if log_decay is None:
            s = s + kept
        else:
            keep = log_decay.to(wide).exp()
            keep = keep[:, None, None] if keep.ndim == 1 else (
                keep[:, 0, :, :, None] if keep.ndim == 4 else keep[:, 0, :, None, None])
            s = torch.addcmul(s, kept, keep)
    y = (q[:, 0, :, :, None].to(wide) * s).sum(2)
    if scale != 1.0:
        y = y * scale
    return y.to(v.dtype)[:, None], s


def _per_head(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)


def _choose(g: Tensor, size: int) -> tuple[int, str]:
    """The longest chunk over which the factored form bears the decay, or the form for the rest.

    g: (B, T, H) or (B, T, H, K), T a multiple of size.
    """
    for shorter in (size, size // 2, size // 4):
        # a NaN fails this test too, and ends in a form that keeps it to its own row
        if shorter and bool(g.unflatten(1, (-1, shorter)).sum(2).amin() >= -WIDEST):
            return shorter, "factored"
    return size, "levels" if g.ndim == 4 else "pairs"


class _Factors(NamedTuple):
    """What decay and resets multiply in every chunk; None where that is 1.

    left, right: (B, N, C, H, K or 1), rows i and j of a chunk. enter, leave, keep: the state on
    its way into a chunk's outputs, a chunk's sum on its way into the state, the state on its way
    through the chunk; broadcast to (B, N, G, K, H/G, V). c: cumulative decay, in the shape of left.
    same: (B, N, C, C), 1 where two steps are of one document; first, final: (B, N, 1, C, 1), 1 for
    steps of the chunk's first and last document.
    """

    left: Tensor | None = None
    right: Tensor | None = None
    enter: Tensor | None = None
    leave: Tensor | None = None
    keep: Tensor | None = None
    c: Tensor | None = None
    same: Tensor | None = None
    first: Tensor | None = None
    final: Tensor | None = None


def _factors(g: Tensor | None, reset: Tensor | None, size: int, form: str, groups: int,
             ) -> _Factors:
    f = _Factors()
    if reset is not None:
        document = reset.unflatten(1, (-1, size)).cumsum(2)
        f = f._replace(same=document[:, :, :, None] == document[:, :, None, :],
                       first=(document == 0)[:, :, None, :, None],
                       final=(document == document[:, :, -1:])[:, :, None, :, None],
                       keep=(document[:, :, -1] == 0)[:, :, None, None, None, None])
    if g is None:
        return f
    g = g.unflatten(1, (-1, size))
    # over a wide range float32 would keep too few digits of the differences
    c = _running(g if form == "factored" else g.double())
    b = c[:, :, -1]
    middle = b[:, :, None] / 2 if form == "factored" else 0.0
    end = middle if form == "factored" else b[:, :, None]
    left, right = (c - middle).to(g.dtype).exp(), (end - c).to(g.dtype).exp()
    b = b.to(g.dtype)
    b = b[..., None, None] if g.ndim == 5 else b.unflatten(2, (groups, -1))[:, :, :, None, :, None]
    if g.ndim == 4:
        left, right, c = left[..., None], right[..., None], c[..., None]
    if form == "factored":
        f = f._replace(enter=(b / 2).exp(), leave=(b / 2).exp())
    keep = b.exp() if f.keep is None else b.exp() * f.keep
    return f._replace(left=left, right=right, keep=keep, c=c)


def _running(g: Tensor) -> Tensor:
    """Cumulative sum over dim 2, as a product: cumsum over an outer dimension is slow on a CPU."""
    ones = torch.ones(g.shape[2], g.shape[2], dtype=g.dtype, device=g.device).tril()
    return (ones @ g.flatten(3)).view(g.shape)


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor


def _rows(x: Tensor, factor: Tensor | None, groups: int, size: int, dtype: torch.dtype) -> Tensor:
    """x: (B, T, H, D) times factor (B, N, C, H, D or 1) -> contiguous (B N G, C, H/G D)."""
    x = _times(x.unflatten(1, (-1, size)), factor)
    x = x.unflatten(3, (groups, -1)).permute(0, 1, 3, 2, 4, 5)
    out = torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
    return out.view(-1, size, x.shape[4] * x.shape[5])


def _back(x: Tensor, batch: int, groups: int, width: int) -> Tensor:
    """(B N G, C, H/G D) -> (B, N, C, H, D), D being `width`."""
    x = x.view(batch, -1, groups, x.shape[1], x.shape[2] // width, width)
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3, 4)


def _document(x: Tensor, mask: Tensor | None, groups: int) -> Tensor:
    """x: (B N G, C, D) with the rows outside the mask (B, N, 1, C, 1) set to zero."""
    if mask is None:
        return x
    return (x.view(*mask.shape[:2], groups, *x.shape[1:]) * mask).view(x.shape)


def _causal(p: Tensor, same: Tensor | None, groups: int) -> Tensor:
    """Clear, in place, the pairs (B N G, C, C) that look ahead or into another document.

    What lies above the diagonal may be infinite, so it is overwritten, not multiplied.
    """
    p.tril_()
    if same is not None:
        p.view(*same.shape[:2], groups, *p.shape[1:]).mul_(same[:, :, None])
    return p


def _carry(first: Tensor, keep: Tensor | None, add: Tensor, *, backward: bool = False) -> Tensor:
    """S_{n+1} = keep_n S_n + add_n over dim 1 of add, or from the last to the first.

    first: (B, ...), add: (B, N, ...) -> (B, N + 1, ...), `first` included at its end.
    """
    count = add.shape[1]
    out = add.new_empty(add.shape[0], count + 1, *add.shape[2:])
    out[:, count if backward else 0] = first
    for n in reversed(range(count)) if backward else range(count):
        before, after = (n + 1, n) if backward else (n, n + 1)
        if keep is None:
            torch.add(out[:, before], add[:, n], out=out[:, after])
        else:
            torch.addcmul(add[:, n], keep[:, n], out[:, before], out=out[:, after])
    return out


class _Chunked(torch.autograd.Function):
    """Inputs padded to whole chunks; g: None, (B or 1, T, H) or (B, T, H, K) and state: wide."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor,
                reset: Tensor | None, scale: float, size: int, form: str, compute: torch.dtype,
                ) -> tuple[Tensor, Tensor]:
        with torch.autocast(v.device.type, enabled=False):
            batch, length, heads, value = v.shape
            groups = q.shape[2]
            shape = (batch, length // size, groups, q.shape[3], heads // groups, value)
            f = _factors(g, reset, size, form, groups)
            by_key = g is not None and (g.ndim == 4 or form != "factored")
            ql = _rows(q, f.left if by_key else None, groups, size, compute)
            kr = _rows(k, f.right if by_key else None, groups, size, compute)
            vr = _rows(v, None if by_key else f.right, groups, size, compute)
            q0 = k0 = None
            if form != "factored":
                q0, k0 = (_rows(x, None, groups, size, compute) for x in (q, k))
            add = torch.bmm(_document(kr, f.final, groups).mT, vr).view(shape)
            start = state.unflatten(1, (groups, -1)).transpose(2, 3)
            states = _carry(start, f.keep, _times(add.to(state.dtype), f.leave))
            entering = _entering(states, f, compute)
            p = _scores(form, ql, kr, q0, k0, f, groups)
            apart = ctx.needs_input_grad[3] and not by_key
            own = _take_diagonal(p) if apart else None
            y = torch.bmm(_document(ql, f.first, groups), entering)
            y.baddbmm_(p, vr, beta=scale, alpha=scale)
            y = _times(_back(y, batch, groups, value), None if by_key else f.left)
            y = past = y.to(compute).reshape(v.shape)
            if own is not None:
                y = past + _own(own, v, scale)
            y = y.to(v.dtype)
            last = states[:, -1].transpose(2, 3).reshape(state.shape)
        ctx.save_for_backward(ql, kr, vr, q0, k0, past if apart else None,
                              reset, states, *f)
        ctx.constants = q.dtype, k.dtype, g is not None and g.shape, scale, form, by_key, shape
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        ql, kr, vr, q0, k0, past, reset, states, *rest = ctx.saved_tensors
        f = _Factors(*rest)
        q_dtype, k_dtype, g_shape, scale, form, by_key, shape = ctx.constants
        batch, _, groups, width, per_group, value = shape
        size, compute, wide = vr.shape[1], vr.dtype, states.dtype
        with torch.autocast(dy.device.type, enabled=False):
            dyl = dy if scale == 1.0 else dy * scale
            dyl = _rows(dyl, None if by_key else f.left, groups, size, compute)
            p = _scores(form, ql, kr, q0, k0, f, groups)
            dp = _causal(torch.bmm(dyl, vr.mT), f.same, groups)
            # A step's own key and value meet without decay. Where the gradient of a decay is
            # wanted they are kept apart: their share would cancel in it, but for rounding.
            apart = ctx.needs_input_grad[3]
            own = _take_diagonal(dp if by_key else p) if apart else None
            add = torch.bmm(_document(ql, f.first, groups).mT, dyl).view(shape)
            end = dlast.unflatten(1, (groups, per_group)).transpose(2, 3)
            dstates = _carry(end, f.keep, _times(add.to(wide), f.enter), backward=True)
            leaving = _times(dstates[:, 1:], f.leave).to(compute).reshape(ql.shape[0],
                                                                          ql.shape[2], -1)
            dq = _document(torch.bmm(dyl, _entering(states, f, compute).mT), f.first, groups)
            dk = _document(torch.bmm(vr, leaving.mT), f.final, groups)
            dv = torch.bmm(_document(kr, f.final, groups), leaving).baddbmm_(p.mT, dyl)
            dq0, dk0 = None, None
            if form == "factored":
                dq.baddbmm_(dp, kr)
                dk.baddbmm_(dp.mT, ql)
            else:
                dq0, dk0 = _scores_backward(form, dp, q0, k0, f)
            dg = None
            if apart:
                # c_i multiplies what row i reads and divides what it writes; b, what leaves
                if by_key:
                    dc = ql.to(wide) * dq - kr.to(wide) * dk
                    if dq0 is not None:
                        dc += q0.to(wide) * dq0 - k0.to(wide) * dk0
                    dc = _back(dc, batch, groups, width)
                    db = (states[:, 1:] * dstates[:, 1:]).sum((-2, -1))
                    to_q, to_k, from_q, from_k = ((dq, dk, ql, kr) if dq0 is None else
                                                  (dq0, dk0, q0, k0))
                    to_q.addcmul_(own, from_k)
                    to_k.addcmul_(own, from_q)
                else:
                    dc = (past.to(wide) * dy).sum(-1).unflatten(1, (-1, size))
                    dc -= _back(vr.to(wide) * dv, batch, groups, value).sum(-1)
                    db = (states[:, 1:] * dstates[:, 1:]).sum((3, 5)).flatten(2)
                if len(g_shape) == 3 and by_key:
                    dc, db = dc.sum(-1), db.sum(-1)
                dg = _decay_gradient(dc, db, f, reset).to(wide)
                if g_shape[0] < batch:
                    dg = dg.sum(0, keepdim=True)
            dq = _times(_back(dq, batch, groups, width), f.left if by_key else None)
            dk = _times(_back(dk, batch, groups, width), f.right if by_key else None)
            dv = _times(_back(dv, batch, groups, value), None if by_key else f.right)
            if apart and not by_key:
                dv = dv + _own(own, dy, scale).unflatten(1, (-1, size))
            if dq0 is not None:
                dq = dq + _back(dq0, batch, groups, width)
                dk = dk + _back(dk0, batch, groups, width)
            dstate = dstates[:, 0].transpose(2, 3).flatten(1, 2)
        return (dq.to(q_dtype).flatten(1, 2), dk.to(k_dtype).flatten(1, 2),
                dv.to(dy.dtype).flatten(1, 2), dg, dstate, None, None, None, None, None)


def _take_diagonal(p: Tensor) -> Tensor:
    """The diagonal of p (X, C, C), as (X, C, 1), which is zero in p after."""
    diagonal = p.diagonal(dim1=1, dim2=2)[..., None].clone()
    p.tril_(-1)
    return diagonal


def _own(diagonal: Tensor, v: Tensor, scale: float) -> Tensor:
    """What each step's own score, (B N G, C, 1), adds: scale * score * v, (B, T, H, V)."""
    batch, length, heads, _ = v.shape
    groups = diagonal.numel() // (batch * length)
    scores = diagonal.view(batch, -1, groups, diagonal.shape[1]).transpose(2, 3) * scale
    scores = scores.reshape(batch, length, groups, 1, 1)
    return (v.unflatten(2, (groups, -1)) * scores).flatten(2, 3)


def _entering(states: Tensor, f: _Factors, dtype: torch.dtype) -> Tensor:
    """The states before each chunk as factors of its outputs: (B N G, K, H/G V)."""
    s = _times(states[:, :-1], f.enter).to(dtype)
    return s.reshape(-1, s.shape[3], s.shape[4] * s.shape[5])


def _decay_gradient(dc: Tensor, db: Tensor, f: _Factors, reset: Tensor | None) -> Tensor:
    """c_i sums the decays up to i, and b all: dg_t = sum_{i >= t} dc_i + db, in t's document.

    dc: (B, N, C, H) or (B, N, C, H, K), db: without C -> (B, T, H) or (B, T, H, K).
    """
    size = dc.shape[2]
    later = torch.ones(size, size, dtype=dc.dtype, device=dc.device).triu()
    db = db[:, :, None]
    if reset is not None:
        later = later * f.same
        db = db * f.final.reshape(*f.final.shape[:2], size, *[1] * (dc.ndim - 3))
    dg = ((later @ dc.flatten(3)).view(dc.shape) + db).flatten(1, 2)
    if reset is not None:
        dg.masked_fill_(reset.reshape(*reset.shape, *[1] * (dg.ndim - 2)), 0.0)
    return dg


def _scores(form: str, ql: Tensor, kr: Tensor, q0: Tensor | None, k0: Tensor | None, f: _Factors,
            groups: int) -> Tensor:
    """p_ij = q_i . k_j e^{c_i - c_j} for j <= i, 0 elsewhere: (B N G, C, C)."""
    if q0 is None or k0 is None:
        p = torch.bmm(ql, kr.mT)
    elif form == "pairs":
        p = _times_pairs(torch.bmm(q0, k0.mT), f)
    else:
        p = _levels(q0, k0, _level_factors(q0, f))
    return _causal(p, f.same, groups)


def _scores_backward(form: str, dp: Tensor, q0: Tensor, k0: Tensor, f: _Factors,
                     ) -> tuple[Tensor, Tensor]:
    """Gradients of q and k through the scores below the diagonal, forms "pairs" and "levels"."""
    if form == "pairs":
        dp = _times_pairs(dp, f)
        return torch.bmm(dp, k0), torch.bmm(dp.mT, q0)
    return _levels_backward(dp, q0, k0, _level_factors(q0, f))


def _times_pairs(p: Tensor, f: _Factors) -> Tensor:
    """p (B N H, C, C) times e^{c_i - c_j}, which is wanted only where it is at most 1."""
    assert f.c is not None
    assert f.left is not None
    c = f.c[..., 0].transpose(2, 3)
    decay = (c[..., :, None] - c[..., None, :]).clamp_(max=0).to(f.left.dtype).exp()
    return (p.view(-1, *decay.shape[1:]) * decay.to(p.dtype)).view(p.shape)


def _level_factors(q: Tensor, f: _Factors) -> list[tuple[int, Tensor, Tensor]]:
    """For squares of side C/2, C/4, ... 1 below the diagonal: the side, and the factors of their
    rows and columns, each (B N H, C / (2 side), side, K) and at most 1."""
    assert f.c is not None
    assert f.left is not None
    c = f.c.transpose(2, 3).reshape(q.shape)
    factors, side = [], q.shape[1] // 2
    while side:
        halves = c.unflatten(1, (-1, 2, side))
        border = halves[:, :, 0, -1:]
        factors.append((side, (halves[:, :, 1] - border).to(f.left.dtype).exp(),
                        (border - halves[:, :, 0]).to(f.left.dtype).exp()))
        side //= 2
    return factors


def _squares(p: Tensor, side: int) -> Tensor:
    """Squares of that side below the diagonal of p (X, C, C): a view (X, number, side, side)."""
    blocks = p.unflatten(2, (-1, 2, side)).unflatten(1, (-1, 2, side))
    return blocks[:, :, 1, :, :, 0].diagonal(dim1=1, dim2=3).movedim(-1, 1)


def _halves(x: Tensor, side: int, second: int) -> Tensor:
    return x.unflatten(1, (-1, 2, side))[:, :, second]


def _levels(q: Tensor, k: Tensor, factors: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    p = q.new_zeros(q.shape[0], q.shape[1], q.shape[1])
    p.diagonal(dim1=1, dim2=2).copy_((q * k).sum(-1))
    for side, left, right in factors:
        rows = (_halves(q, side, 1) * left).to(q.dtype)
        columns = (_halves(k, side, 0) * right).to(q.dtype)
        _squares(p, side).copy_(rows @ columns.mT)
    return p


def _levels_backward(dp: Tensor, q: Tensor, k: Tensor, factors: list[tuple[int, Tensor, Tensor]],
                     ) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dk = torch.zeros_like(q, dtype=wide), torch.zeros_like(k, dtype=wide)
    for side, left, right in factors:
        square = _squares(dp, side)
        columns = (_halves(k, side, 0) * right).to(q.dtype)
        rows = (_halves(q, side, 1) * left).to(q.dtype)
        _halves(dq, side, 1).add_((square @ columns) * left)
        _halves(dk, side, 0).add_((square.mT @ rows) * right)
    return dq, dk
