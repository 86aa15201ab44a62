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

from manyform.ops import tiled_decay
from manyform.ops.kernels import single, usable
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
    if compute == torch.bfloat16:
        y_and_state = _tiled(q, k, v, log_decay, state, reset, scale)
        if y_and_state is not None:
            return y_and_state
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
    compiled = (v.numel() >= SMALL and usable(q, k, v, g, state) and single(q, k, v, g)
                and all(x.stride(3) == 1 for x in (q, k, v))
                and (g is None or g.ndim == 3 or (g.stride(3) == 1 and g.shape[3] % 16 == 0)))
    y, last = _Chunked.apply(q, k, v, g, state.to(wide), reset, scale, size, form, compute,
                             compiled)
    return (y[:, :length] if pad else y), last


def _tiled(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor | None,
           reset: Tensor | None, scale: float) -> tuple[Tensor, Tensor] | None:
    """On matrix tiles, where that applies."""
    batch, length, heads, value = v.shape
    g = None if log_decay is None else log_decay.float()
    g = g.expand(batch, length, heads) if g is not None and g.ndim == 1 else g
    if not tiled_decay.applies(k, v, g, reset):
        return None
    if g is not None and g.ndim == 4:
        q, k = _per_head(q, heads), _per_head(k, heads)
    if state is None:
        state = torch.zeros(batch, heads, k.shape[-1], value)
    y, last = tiled_decay.tiled_decay(q.bfloat16(), k.bfloat16(), v.bfloat16(), g, state.float(),
                                      reset, scale)
    return y.to(v.dtype), last


@matrix_recurrence.path("step", when=_one_step)
def step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None, erase: None = None,
         state: Tensor | None = None, reset: Tensor | None = None, scale: float = 1.0,
         ) -> tuple[Tensor, Tensor]:
    """One token, for decoding: few calls matter more than few operations."""
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    batch, _, heads, value = v.shape
    kept = (torch.zeros(batch, heads, k.shape[-1], value, dtype=wide, device=v.device)
            if state is None else state.to(wide))
    if reset is not None:
        kept = torch.where(reset[:, 0, None, None, None], 0.0, kept)
    given = (q, k, v, log_decay, kept)
    if value % 16 == 0 and usable(*given) and single(*given) and not (
            torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in given)):
        return _loops().step(q, k, v, log_decay, kept, scale)
    q, k = _per_head(q, heads), _per_head(k, heads)
    if log_decay is not None:
        keep = log_decay.to(wide).exp()
        keep = keep[:, None, None] if keep.ndim == 1 else (
            keep[:, 0, :, :, None] if keep.ndim == 4 else keep[:, 0, :, None, None])
        kept = kept * keep
    s = torch.addcmul(kept, k[:, 0, :, :, None].to(wide), v[:, 0, :, None, :].to(wide))
    y = (q[:, 0, :, :, None].to(wide) * s).sum(2)
    if scale != 1.0:
        y = y * scale
    return y.to(v.dtype)[:, None], s


def _loops() -> Any:
    """The compiled passes; imported when first needed."""
    from manyform.ops.kernels import decay_passes
    return decay_passes


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
             compiled: bool) -> _Factors:
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
    if compiled and g.ndim == 5 and form == "factored":
        left, right, b = _loops().factors(g)
        half, keep = (b / 2).exp()[..., None, None], b.exp()[..., None, None]
        return f._replace(left=left, right=right, enter=half, leave=half,
                          keep=keep if f.keep is None else keep * f.keep)
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


def _rows(x: Tensor, factor: Tensor | None, groups: int, size: int, dtype: torch.dtype,
          compiled: bool, scale: float = 1.0) -> Tensor:
    """scale * x (B, T, H, D) * factor (B, N, C, H, D or 1) -> contiguous (B N G, C, H/G D)."""
    if compiled:
        return _loops().gather(x, factor, groups, size, dtype, scale)
    x = x if scale == 1.0 else x * scale
    x = _times(x.unflatten(1, (-1, size)), factor)
    x = x.unflatten(3, (groups, -1)).permute(0, 1, 3, 2, 4, 5)
    out = torch.empty(x.shape, dtype=dtype, device=x.device).copy_(x)
    return out.view(-1, size, x.shape[4] * x.shape[5])


def _natural(rows: Tensor, factor: Tensor | None, groups: int, width: int, like: Tensor,
             dtype: torch.dtype, compiled: bool, own: Tensor | None = None) -> Tensor:
    """The inverse: rows * factor, as (B, T, H, D), D being `width`; plus own (B N G, C, 1) * like.

    like: (B, T, H, D) or, without `own`, any tensor of that B and T.
    """
    batch, length = like.shape[:2]
    if compiled:
        return _loops().scatter(rows, factor, groups, width, like, dtype, own)
    y = _times(_back(rows, batch, groups, width), factor).flatten(1, 2)
    if own is not None:
        own = own.view(batch, -1, groups, rows.shape[1]).transpose(2, 3)
        own = own.reshape(batch, length, groups, 1, 1)
        y = y + (like.unflatten(2, (groups, -1)) * own).flatten(2, 3)
    return y.to(dtype)


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


def _carry(start: Tensor, add: Tensor, f: _Factors, compiled: bool) -> tuple[Tensor, Tensor]:
    """S_{n+1} = keep_n S_n + leave_n add_n, from chunk to chunk.

    start: (B, G, K, H/G, V), wide; add: (B, N, G, K, H/G, V). Returns enter_n S_n in the dtype of
    add, as factors of the outputs (B N G, K, H/G V), and the last S.
    """
    if compiled:
        entering, s = _loops().carry(start, add, f.keep, f.enter, f.leave)
    else:
        entering, s, leaving = torch.empty_like(add), start, _times(add.to(start.dtype), f.leave)
        for n in range(add.shape[1]):
            entering[:, n] = s if f.enter is None else s * f.enter[:, n]
            s = leaving[:, n] + s if f.keep is None else torch.addcmul(leaving[:, n], f.keep[:, n],
                                                                       s)
    return entering.flatten(0, 2).flatten(2), s


def _carry_back(end: Tensor, add: Tensor, f: _Factors, entering: Tensor, last: Tensor,
                compiled: bool) -> tuple[Tensor, Tensor, Tensor]:
    """dS_n = keep_n dS_{n+1} + enter_n add_n, from the last chunk to the first.

    end, last: wide; add: (B, N, G, K, H/G, V). Returns leave_n dS_{n+1} (B N G, K, H/G V), dS_0,
    and the gradient of each chunk's whole decay, sum of S_{n+1} dS_{n+1}: (B, N, G, K, H/G).
    """
    if compiled:
        leaving, s, db = _loops().carry_back(end, add, f.keep, f.enter, f.leave, entering, last)
        return leaving.flatten(0, 2).flatten(2), s, db
    leaving, s, coming = torch.empty_like(add), end, _times(add.to(end.dtype), f.enter)
    after = entering.view(add.shape)[:, 1:].to(end.dtype)
    after = after if f.enter is None else after / f.enter[:, 1:]
    db = end.new_empty(add.shape[:-1])
    for n in reversed(range(add.shape[1])):
        db[:, n] = (s * (last if n == add.shape[1] - 1 else after[:, n])).sum(-1)
        leaving[:, n] = s if f.leave is None else s * f.leave[:, n]
        s = coming[:, n] + s if f.keep is None else torch.addcmul(coming[:, n], f.keep[:, n], s)
    return leaving.flatten(0, 2).flatten(2), s, db


class _Chunked(torch.autograd.Function):
    """Inputs padded to whole chunks; g: None, (B or 1, T, H) or (B, T, H, K) and state: wide."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor,
                reset: Tensor | None, scale: float, size: int, form: str, compute: torch.dtype,
                compiled: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast(v.device.type, enabled=False):
            batch, length, heads, value = v.shape
            groups = q.shape[2]
            shape = (batch, length // size, groups, q.shape[3], heads // groups, value)
            f = _factors(g, reset, size, form, groups, compiled)
            by_key = g is not None and (g.ndim == 4 or form != "factored")
            read, write = (f.left, f.right) if by_key else (None, None)
            kind = groups, size, compute, compiled
            ql, kr = _rows(q, read, *kind), _rows(k, write, *kind)
            vr = _rows(v, None if by_key else f.right, *kind)
            q0 = k0 = own = None
            if form != "factored":
                q0, k0 = _rows(q, None, *kind), _rows(k, None, *kind)
            add = torch.bmm(_document(kr, f.final, groups).mT, vr).view(shape)
            start = state.unflatten(1, (groups, -1)).transpose(2, 3)
            entering, last = _carry(start, add, f, compiled)
            p = _scores(form, ql, kr, q0, k0, f, groups)
            # A step's own key and value meet without decay. Where the gradient of a decay is
            # wanted they are kept apart: their share would cancel in it, but for rounding.
            apart = ctx.needs_input_grad[3] and not by_key
            if apart:
                own = _take_diagonal(p) * scale
            left = None if by_key or f.left is None else f.left * scale
            alpha = scale if left is None else 1.0
            y = past = torch.bmm(_document(ql, f.first, groups), entering).baddbmm_(
                p, vr, beta=alpha, alpha=alpha)
            y = _natural(y, left, groups, value, v, v.dtype, compiled, own)
        ctx.save_for_backward(ql, kr, vr, q0, k0, past if apart else None, reset, entering, last,
                              *f)
        ctx.constants = (q.dtype, k.dtype, g is not None and g.shape, scale, form, by_key, shape,
                         compiled)
        return y, last.transpose(2, 3).reshape(state.shape).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
        ql, kr, vr, q0, k0, past, reset, entering, last, *rest = ctx.saved_tensors
        f = _Factors(*rest)
        q_dtype, k_dtype, g_shape, scale, form, by_key, shape, compiled = ctx.constants
        batch, _, groups, width, per_group, value = shape
        size, compute = vr.shape[1], vr.dtype
        compiled = compiled and dy.stride(3) == 1
        with torch.autocast(dy.device.type, enabled=False):
            dyl = _rows(dy, None if by_key else f.left, groups, size, compute, compiled, scale)
            p = _scores(form, ql, kr, q0, k0, f, groups)
            dp = _causal(torch.bmm(dyl, vr.mT), f.same, groups)
            apart = ctx.needs_input_grad[3]
            own = _take_diagonal(dp if by_key else p) if apart else None
            add = torch.bmm(_document(ql, f.first, groups).mT, dyl).view(shape)
            end = dlast.unflatten(1, (groups, per_group)).transpose(2, 3)
            leaving, dstate, db = _carry_back(end, add, f, entering, last, compiled)
            dq = _document(torch.bmm(dyl, entering.mT), f.first, groups)
            dk = _document(torch.bmm(vr, leaving.mT), f.final, groups)
            dv = torch.bmm(_document(kr, f.final, groups), leaving).baddbmm_(p.mT, dyl)
            dq0, dk0, dg = None, None, None
            if form == "factored":
                dq.baddbmm_(dp, kr)
                dk.baddbmm_(dp.mT, ql)
            else:
                dq0, dk0 = _scores_backward(form, dp, q0, k0, f)
            if apart:
                # c_i multiplies what row i reads and divides what it writes; b, what leaves
                if not by_key:
                    dc = _products(past, dyl, vr, dv, per_group, compiled)
                    dc = _back(dc, batch, groups, 1)[..., 0]
                    db = db.sum(3).flatten(2)
                    dg = _decay_gradient(dc, db, f, reset)
                elif compiled and len(g_shape) == 4 and reset is None and dq0 is None:
                    dg = _loops().decay_gradient(ql, dq, kr, dk, db)
                else:
                    wide = db.dtype
                    dc = ql.to(wide) * dq - kr.to(wide) * dk
                    if dq0 is not None:
                        dc += q0.to(wide) * dq0 - k0.to(wide) * dk0
                    dc, db = _back(dc, batch, groups, width), db[..., 0]
                    if len(g_shape) == 3:
                        dc, db = dc.sum(-1), db.sum(-1)
                    dg = _decay_gradient(dc, db, f, reset)
                if g_shape[0] < batch:
                    dg = dg.sum(0, keepdim=True)
                if by_key:
                    to_q, to_k, from_q, from_k = ((dq, dk, ql, kr) if dq0 is None else
                                                  (dq0, dk0, q0, k0))
                    _add_own(own, to_q, to_k, from_q, from_k)
            own = None if by_key or own is None else own * scale
            dq = _natural(dq, f.left if by_key else None, groups, width, dy, q_dtype, compiled)
            dk = _natural(dk, f.right if by_key else None, groups, width, dy, k_dtype, compiled)
            dv = _natural(dv, None if by_key else f.right, groups, value, dy, dy.dtype, compiled,
                          own)
            if dq0 is not None and dk0 is not None:
                dq += _natural(dq0, None, groups, width, dy, q_dtype, False)
                dk += _natural(dk0, None, groups, width, dy, k_dtype, False)
            dstate = dstate.transpose(2, 3).flatten(1, 2)
        return dq, dk, dv, dg, dstate, None, None, None, None, None, None


def _products(a: Tensor, b: Tensor, c: Tensor, d: Tensor, heads: int, compiled: bool) -> Tensor:
    """a . b - c . d of each head: (B N G, C, H/G V) -> (B N G, C, H/G)."""
    if compiled:
        return _loops().products(a, b, c, d, heads)
    wide = torch.promote_types(a.dtype, torch.float32)
    both = a.to(wide) * b - c.to(wide) * d
    return both.unflatten(2, (heads, -1)).sum(-1)


def _add_own(own: Any, dq: Any, dk: Any, q: Any, k: Any) -> None:
    """In place, the gradients through each step's own score."""
    dq.addcmul_(own, k)
    dk.addcmul_(own, q)


def _take_diagonal(p: Tensor) -> Tensor:
    """The diagonal of p (X, C, C), as (X, C, 1), which is zero in p after."""
    diagonal = p.diagonal(dim1=1, dim2=2)[..., None].clone()
    p.tril_(-1)
    return diagonal


def _decay_gradient(dc: Tensor, db: Tensor, f: _Factors, reset: Tensor | None) -> Tensor:
    """c_i sums the decays up to i, and b all: dg_t = sum_{i >= t} dc_i + db, in t's document.

    dc: (B, N, C, H) or (B, N, C, H, K), db: without C -> (B, T, H) or (B, T, H, K).
    """
    size = dc.shape[2]
    later = torch.ones(size, size, dtype=dc.dtype, device=dc.device).triu()
    db = db[:, :, None]
    if reset is not None:
        assert f.same is not None
        assert f.final is not None
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
