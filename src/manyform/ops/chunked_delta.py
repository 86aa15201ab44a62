"""The fast forms of `matrix_recurrence` with an erase term: chunks of products, and one step.

Within a chunk of C steps, with c_i the sum of log decays up to step i, e_i the sum before it and S
the state that comes in, unrolling the recurrence gives

    u_i = a_i^T S_{i-1} = exp(e_i) a_i^T S + sum_{j<i} exp(e_i - c_j) (a_i.b_j u_j + a_i.k_j v_j)

so that U solves a unit lower-triangular system and y and the next state are products (Yang 2024,
"Parallelizing Linear Transformers with the Delta Rule over Sequence Length", section 3; the decay
as in Yang 2024, "Gated Delta Networks", section 3.3). With T = (I - L)^-1, L the a.b terms and M
the a.k terms, A_b and A_k those of the query, and hats for rows that carry their decay:

    U = T (M V + A^ S)          y = Q^ S + A_b U + A_k V        S' = exp(c_C) S + B~^T U + K~^T V

U is linear in S, hence S' = F S + N with F and N of every chunk at once, and only S' = F S + N
runs in sequence. Where k and b are one tensor, W = U + V solves W = T (V + A^ S) and stands for
both. The backward pass is the same shape: dS = P^T dy + F^T dS' in sequence, the rest at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from manyform.ops import tiled_delta
from manyform.ops.kernels import usable
from manyform.ops.matrix_recurrence import matrix_recurrence

CHUNK = 64
LIMIT = 60.0
"""Largest total log decay of a chunk, a channel: its factors exp(c_i) and exp(-c_j) and their
masked products stay finite in float32 and bfloat16."""

SMALL = 2**22
"""Below this many state elements times steps, products of bfloat16 input are taken in float32:
there they cost less than the calls do."""

Erase = tuple[Tensor, Tensor]


class Frame(NamedTuple):
    """What decay and resets do to the products of a chunk. N = (T / C) B H chunks, in that order.

    pair: (..., C, C), row i, column j: what a query at i sees of step j (0 if nothing).
    starts: (T/C, B, C) bool, true where a document begins, or None.
    mix_x, mix_y: factors of [a; q] and of b and k each: a decay of a channel; None is 1.
    read, write: factors, besides, of [a; q] when they read the incoming state, and of b and k when
    they write to the outgoing one. keep: (N, K or 1, 1), what stays of the incoming state.
    cumulate: (..., C, C), the sums that make c of log decays.
    """

    pair: Tensor
    starts: Tensor | None
    mix_x: Tensor | None
    mix_y: Tensor | None
    read: Tensor | None
    write: Tensor | None
    keep: Tensor | None
    cumulate: Tensor


def _chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, ...) -> (T/C, B, C, ...), padded with zeros: steps that change nothing."""
    batch, length = x.shape[:2]
    if length % size:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, size - length % size))
    return x.reshape(batch, -1, size, *x.shape[2:]).transpose(0, 1)


def _head_chunks(x: Tensor, size: int) -> Tensor:
    """(B, T, H, D) -> (T/C, B, H, C, D), a view where T is whole chunks."""
    return _chunks(x, size).transpose(2, 3)


def _join(x: Tensor, length: int) -> Tensor:
    """(T/C, B, H, C, D) -> (B, T, H, D)."""
    n, batch, heads, size, d = x.shape
    return x.permute(1, 0, 3, 2, 4).reshape(batch, n * size, heads, d)[:, :length]


def _frame(log_decay: Tensor | None, reset: Tensor | None, shape: tuple[int, ...], size: int,
           dtype: torch.dtype, wide: torch.dtype, device: torch.device) -> Frame:
    """shape: (T/C, B, H). Sums restart with each document, so that nothing of one enters another.
    """
    tril = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    starts = first = last = None
    same = tril
    if reset is not None:
        starts = _chunks(reset, size)
        segment = starts.cumsum(-1)
        same = tril & (segment[..., :, None] == segment[..., None, :])
        first = (segment == 0)[:, :, None, :, None]
        last = (segment == segment[..., -1:])[:, :, None, :, None]
    cumulate = same.to(wide)
    pair = same if same.ndim == 2 else same[:, :, None]
    mix_x = mix_y = read = write = keep = None
    if first is not None and last is not None:
        read = torch.cat([first, first], 3).expand(*shape, -1, -1).to(dtype)
        write = last.expand(*shape, -1, -1).to(dtype)
        keep = first[..., -1:, :].expand(*shape, -1, -1).to(wide)
    if log_decay is not None:
        g = _chunks(log_decay, size)
        c = (cumulate @ g.flatten(3)).reshape(g.shape)
        c = (c if c.ndim == 5 else c[..., None]).transpose(2, 3).contiguous()
        ends = c[..., -1:, :]
        kept = torch.cat([F.pad(c[..., :-1, :], (0, 0, 1, 0)), c], 3).exp_()
        keep = ends.exp() if keep is None else ends.exp() * keep
        if log_decay.ndim == 3:
            pair = (c - c.mT).masked_fill_(~pair, -torch.inf).exp_()
            # Where a chunk holds two documents, ends - c means nothing for the first, and may be
            # large: it is replaced, not multiplied.
            left = ends - c if last is None else (ends - c).masked_fill_(~last, -torch.inf)
            read = kept.to(dtype) if read is None else read * kept
            write = left.exp_()
        else:
            mix_x, mix_y = kept.to(dtype), (-c).exp_().to(dtype)
            write = ends.exp() if write is None else write * ends.exp()
        read, write = (None if x is None else x.to(dtype) for x in (read, write))
    return Frame(pair.to(dtype).contiguous(), starts, mix_x, mix_y, read, write,
                 None if keep is None else keep.mT.flatten(0, 2), cumulate)


def _mask(products: Tensor, frame: Frame, shape: tuple[int, ...]) -> Tensor:
    """Apply decay and causality in place to products of [a; q] with [k] or [b; k].

    products: (N, 2C, C or 2C). Query i sees what `pair` says; a_i sees what a query at i - 1 does
    (it reads the undecayed S_{i-1}), and nothing where a document begins.
    """
    size = frame.pair.shape[-1]
    if frame.pair.ndim == 2:
        full = torch.cat([frame.pair.tril(-1), frame.pair])
        return products.mul_(full.repeat(1, products.shape[-1] // size))
    if _compiled_mask(products, frame):
        _run_mask(products, None, frame)
        return products
    view = products.view(*shape, 2 * size, -1, size)
    pair = frame.pair[..., :, None, :]
    view[..., size:, :, :] *= pair
    view[..., 1:size, :, :] *= pair[..., :-1, :, :]
    view[..., 0, :, :] = 0
    if frame.starts is not None:
        view[..., :size, :, :].masked_fill_(frame.starts[:, :, None, :, None, None], 0)
    return products


def _compiled_mask(products: Tensor, frame: Frame) -> bool:
    """True if a compiled loop can mask these: a decay for every head and chunk, no resets."""
    size = frame.pair.shape[-1]
    return (frame.starts is None and frame.pair.ndim == 5 and size % 16 == 0 and usable(products)
            and products.dtype != torch.float64 and products.is_contiguous())


def _run_mask(products: Tensor, factors: Tensor | None, frame: Frame) -> tuple[Tensor, Tensor]:
    """Mask in place; the sums of products * factors over rows (N, 2C) and columns (N, C) before,
    nothing in them without factors."""
    from manyform.ops.kernels import delta
    from manyform.ops.kernels.lanes import flat
    size = frame.pair.shape[-1]
    by_x = products.new_empty(len(products), 2 * size, dtype=torch.float32)
    by_y = products.new_empty(len(products), size, dtype=torch.float32)
    delta.mask(flat(products), flat(products if factors is None else factors), flat(frame.pair),
               size, products.shape[2] // size, factors is not None, flat(by_x), flat(by_y))
    return by_x, by_y


def _dots(x: Tensor, y: Tensor, wide: torch.dtype) -> Tensor:
    """Sums of x * y over the last dimension, in the wide dtype."""
    if (usable(x) and wide == torch.float32 and x.shape[-1] % 16 == 0 and x.is_contiguous()
            and y.is_contiguous()):
        from manyform.ops.kernels import delta
        from manyform.ops.kernels.lanes import flat
        out = x.new_empty(x.shape[:-1], dtype=wide)
        delta.dots(flat(x), flat(y), x.shape[-1], flat(out))
        return out
    return (x.to(wide) * y).sum(-1)


def unit_inverse(lower: Tensor) -> Tensor:
    """(I - L)^-1 of strictly lower-triangular L: (N, C, C), by halves.

    [[P, 0], [-Q, R]]^-1 = [[P^-1, 0], [R^-1 Q P^-1, R^-1]], both diagonal blocks in one batch.
    """
    n, size = lower.shape[:2]
    if size <= 32:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(eye - lower, eye.expand_as(lower), upper=False,
                                             unitriangular=True)
    half = size // 2
    blocks = unit_inverse(torch.cat([lower[:, :half, :half], lower[:, half:, half:]]))
    out = torch.zeros_like(lower)
    out[:, :half, :half], out[:, half:, half:] = blocks[:n], blocks[n:]
    out[:, half:, :half] = blocks[n:] @ (lower[:, half:, :half] @ blocks[:n])
    return out


class _Parts(NamedTuple):
    """Products that forward and backward share. X = [a; q]; Y = [b; k], or k where it is b too."""

    x_mix: Tensor      # (N, 2C, K)
    y_mix: Tensor      # (N, C or 2C, K)
    x_read: Tensor
    y_write: Tensor
    products: Tensor   # (N, 2C, C or 2C), masked
    v: Tensor          # (N, C, V)


def _times(x: Tensor, factor: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """x: (N, m, K) times a factor (*shape, m, m/2 or 1, K or 1); m/2 rows serve both halves."""
    if factor is None:
        return x
    rows = x.shape[1] if factor.shape[3] == 1 else factor.shape[3]
    return (x.view(*shape, -1, rows, x.shape[-1]) * factor[:, :, :, None]).view(x.shape)


def _compiled(log_decay: Tensor | None, reset: Tensor | None, *rows: Tensor | None) -> bool:
    """True if compiled loops can take decays of a channel in and out of the chunks' rows."""
    return (log_decay is not None and log_decay.ndim == 4 and reset is None
            and log_decay.dtype == torch.float32 and log_decay.shape[-1] % 16 == 0
            and usable(log_decay)
            and all(x is None or x.stride(-1) == 1 for x in (log_decay, *rows)))


def _compiled_parts(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor | None,
                    log_decay: Tensor, shape: tuple[int, ...], size: int, scale: float,
                    ) -> tuple[_Parts, Frame]:
    from manyform.ops.kernels import delta
    from manyform.ops.kernels.lanes import flat
    batch, length, heads, key = k.shape
    n = shape[0] * batch * heads
    x, keep = q.new_empty(n, 2 * size, key), log_decay.new_empty(n, key, 1)
    y = k.new_empty(n, size if b is None else 2 * size, key)
    rows = (q, a, k, k if b is None else b, log_decay)
    lines: Any = [flat(t) for t in rows]
    loop: Any = delta.split
    loop(*lines, np.array([t.stride()[:3] for t in rows]),
         (batch, length, heads, key, size), scale, b is not None, flat(x), flat(y), flat(keep))
    pair = torch.ones(size, size, dtype=v.dtype, device=v.device).tril()
    write = keep.view(*shape, 1, key).to(v.dtype)
    frame = Frame(pair, None, None, None, None, write, keep, pair)
    products = _mask(x @ y.mT, frame, shape)
    return _Parts(x, y, x, _times(y, write, shape), products,
                  _head_chunks(v, size).flatten(0, 2)), frame


def _compiled_join(p: _Parts, dx: Tensor, dk: Tensor, dy_write: Tensor, kept: Tensor, k: Tensor,
                   b: Tensor | None, log_decay: Tensor, size: int, scale: float,
                   ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, a, b and the log decays."""
    from manyform.ops.kernels import delta
    from manyform.ops.kernels.lanes import flat
    dq_, da_, dk_, db_ = (torch.empty_like(k, memory_format=torch.contiguous_format)
                          for _ in range(4))
    dg = torch.empty_like(log_decay, memory_format=torch.contiguous_format)
    batch, length, heads, key = k.shape
    lines: Any = [flat(t.contiguous()) for t in (p.x_mix, p.y_mix, dx, dk, dy_write, kept)]
    loop: Any = delta.join
    loop(*lines, flat(log_decay), np.array([log_decay.stride()[:3]]),
         (batch, length, heads, key, size), scale, b is not None, flat(dq_), flat(da_), flat(dk_),
         flat(db_), flat(dg))
    return dq_, dk_, da_, None if b is None else db_, dg


def _parts(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor | None, log_decay: Tensor | None,
           reset: Tensor | None, shape: tuple[int, ...], size: int, scale: float,
           wide: torch.dtype) -> tuple[_Parts, Frame]:
    if log_decay is not None and _compiled(log_decay, reset, q, k, a, b):
        return _compiled_parts(q, k, v, a, b, log_decay, shape, size, scale)
    frame = _frame(log_decay, reset, shape, size, v.dtype, wide, v.device)
    x = q.new_empty(*shape, 2 * size, k.shape[-1])
    x[..., :size, :] = _head_chunks(a, size)
    torch.mul(_head_chunks(q, size), scale, out=x[..., size:, :])
    if b is None:
        y = _head_chunks(k, size).contiguous()
    else:
        y = k.new_empty(*shape, 2 * size, k.shape[-1])
        y[..., :size, :], y[..., size:, :] = _head_chunks(b, size), _head_chunks(k, size)
    x, y = x.flatten(0, 2), y.flatten(0, 2)
    x_mix, y_mix = _times(x, frame.mix_x, shape), _times(y, frame.mix_y, shape)
    products = _mask(x_mix @ y_mix.mT, frame, shape)
    return _Parts(x_mix, y_mix, _times(x_mix, frame.read, shape), _times(y_mix, frame.write, shape),
                  products, _head_chunks(v, size).flatten(0, 2)), frame


def _transfer(parts: _Parts, solved: Tensor, frame: Frame, wide: torch.dtype) -> Tensor:
    """F of every chunk: diag(keep) + B~^T T A^, (N, K, K), from solved = T A^."""
    size = solved.shape[1]
    transfer = (parts.y_write[:, :size].mT @ solved).to(wide)
    diagonal = transfer.diagonal(dim1=1, dim2=2)
    diagonal += 1 if frame.keep is None else frame.keep[..., 0]
    return transfer


class _ChunkedDelta(torch.autograd.Function):
    """q, k, v, a, b: (B, T, H, .) in one dtype, b None where it is k; log_decay (B, T, H) or
    (B, T, H, K) and state (B, H, K, V) in the wide dtype."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor | None,
                log_decay: Tensor | None, state: Tensor, reset: Tensor | None, scale: float,
                size: int) -> tuple[Tensor, Tensor]:
        batch, length, heads, value = v.shape
        key, wide = k.shape[-1], state.dtype
        n = -(-length // size)
        shape = (n, batch, heads)
        with torch.autocast(v.device.type, enabled=False):
            p, frame = _parts(q, k, v, a, b, log_decay, reset, shape, size, scale, wide)
            inverse = unit_inverse(p.products[:, :size, :size].to(wide)).to(v.dtype)
            right = p.v if b is None else p.products[:, :size, size:] @ p.v
            solved_v, solved_a = inverse @ right, inverse @ p.x_read[:, :size]
            transfer = _transfer(p, solved_a, frame, wide)
            states = torch.empty(n + 1, batch * heads, key, value, dtype=wide, device=v.device)
            states[0] = state.flatten(0, 1)
            new = p.y_write[:, :size].mT @ solved_v
            if b is not None:
                new = torch.baddbmm(new, p.y_write[:, size:].mT, p.v)
            states[1:] = new.view_as(states[1:])
            every = states.unbind(0)
            for i, f in enumerate(transfer.view(n, -1, key, key).unbind(0)):
                every[i + 1].baddbmm_(f, every[i])
            incoming = states[:-1].to(v.dtype).flatten(0, 1)
            u = torch.baddbmm(solved_v, solved_a, incoming)
            y = torch.baddbmm(p.x_read[:, size:] @ incoming, p.products[:, size:, :size], u)
            if b is not None:
                y = torch.baddbmm(y, p.products[:, size:, size:], p.v)
        ctx.save_for_backward(q, k, v, a, b, log_decay, reset, inverse, incoming, u)
        ctx.options = (shape, size, scale, wide)
        return (_join(y.view(*shape, size, value), length),
                states[-1].view(batch, heads, key, value).clone())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dstate: Tensor) -> Any:
        q, k, v, a, b, log_decay, reset, inverse, incoming, u = ctx.saved_tensors
        shape, size, scale, wide = ctx.options
        n, batch, heads = shape
        length, key, value = v.shape[1], k.shape[-1], v.shape[-1]
        with torch.autocast(v.device.type, enabled=False):
            p, frame = _parts(q, k, v, a, b, log_decay, reset, shape, size, scale, wide)
            # zy = [dL/d(T^-1 u); dy], the gradients of the two halves of x's results
            zy = v.new_empty(n * batch * heads, 2 * size, value)
            zy.view(*shape, 2 * size, value)[..., size:, :] = _head_chunks(dy.to(v.dtype), size)
            dy = zy[:, size:]
            solved_a = inverse @ p.x_read[:, :size]
            transfer = _transfer(p, solved_a, frame, wide)
            reads = torch.baddbmm(p.x_read[:, size:], p.products[:, size:, :size], solved_a)
            dstates = torch.empty(n + 1, batch * heads, key, value, dtype=wide, device=v.device)
            dstates[-1] = dstate.flatten(0, 1)
            dstates[:-1] = (reads.mT @ dy).view_as(dstates[1:])
            every = dstates.unbind(0)
            for i, f in reversed(list(enumerate(transfer.view(n, -1, key, key).mT.unbind(0)))):
                every[i].baddbmm_(f, every[i + 1])
            outgoing = dstates[1:].to(v.dtype).flatten(0, 1)
            du = torch.baddbmm(p.y_write[:, :size] @ outgoing, p.products[:, size:, :size].mT, dy)
            zy[:, :size] = inverse.mT @ du
            if b is None:
                uv, dv = u, zy[:, :size]
            else:
                uv = torch.cat([u, p.v], 1)
                dv = torch.baddbmm(p.y_write[:, size:] @ outgoing, p.products[:, :, size:].mT, zy)
            dproducts = zy @ uv.mT
            if log_decay is not None and log_decay.ndim == 3:
                by_x, by_y = _mask_and_sum(dproducts, p.products, frame, shape, wide)
            else:
                _mask(dproducts, frame, shape)
            dx_read, dy_write = zy @ incoming.mT, uv @ outgoing.mT
            dx = torch.baddbmm(_times(dx_read, frame.read, shape), dproducts, p.y_mix)
            dk = torch.baddbmm(_times(dy_write, frame.write, shape), dproducts.mT, p.x_mix)
            dstate = dstates[0].view(batch, heads, key, value)
            dv = _join(dv.view(*shape, size, value), length)
            if log_decay is not None and _compiled(log_decay, reset, q, k, a, b):
                kept = _dots(incoming, dstates[1:].reshape_as(incoming), wide)
                dq, dk, da, db, by_decay = _compiled_join(p, dx, dk, dy_write, kept, k, b,
                                                          log_decay, size, scale)
                return dq, dk, dv, da, db, by_decay, dstate, None, None, None
            dg: Tensor | None = None
            if log_decay is not None:
                assert frame.keep is not None
                kept = _dots(incoming, dstates[1:].reshape_as(incoming), wide)
                if log_decay.ndim == 4:
                    written = (p.y_write.to(wide) * dy_write).view(*shape, -1, size, key).sum(3)
                    by_x = (p.x_mix.to(wide) * dx).view(*shape, 2, size, key)
                    by_y = (p.y_mix.to(wide) * dk).view(*shape, -1, size, key).sum(3)
                else:
                    written = _dots(p.y_write, dy_write, wide).view(*shape, -1, size, 1).sum(3)
                    kept = kept.sum(-1, keepdim=True)
                    by_x = by_x + _dots(p.x_read, dx_read, wide).view_as(by_x)
                    by_y = by_y + written
                ends = written.sum(3) + (frame.keep[..., 0] * kept).view(*shape, -1)
                dg = _decay_gradient(by_x, by_y, ends, frame, log_decay)
            dx, dk = _times(dx, frame.mix_x, shape), _times(dk, frame.mix_y, shape)
            dx, dk = dx.view(*shape, 2, size, key), dk.view(*shape, -1, size, key)
            return (_join(dx[:, :, :, 1], length) * scale, _join(dk[:, :, :, -1], length),
                    dv, _join(dx[:, :, :, 0], length),
                    None if b is None else _join(dk[:, :, :, 0], length), dg,
                    dstate, None, None, None)


def _mask_and_sum(dproducts: Tensor, products: Tensor, frame: Frame, shape: tuple[int, ...],
                  wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mask dproducts; sums of products * dproducts over rows and columns, gradients by totals.

    Both come from the same numbers: most of each total cancels in a difference of totals, which
    products rounded apart from one another would leave as noise.
    """
    size = frame.pair.shape[-1]
    if _compiled_mask(dproducts, frame):
        by_x, by_y = _run_mask(dproducts, products, frame)
        return by_x.view(*shape, 2, size, 1), by_y.view(*shape, size, 1)
    both = (dproducts.to(wide) * products).view(*shape, 2, size, -1, size)
    _mask(dproducts, frame, shape)
    return both.sum((-1, -2))[..., None], both.sum((3, 4, 5))[..., None]


def _decay_gradient(by_x: Tensor, by_y: Tensor, ends: Tensor, frame: Frame, log_decay: Tensor,
                    ) -> Tensor:
    """Gradient of the log decays, (B, T, H) or (B, T, H, K).

    by_x: (T/C, B, H, 2, C, 1 or K), gradients by the totals that a_i and q_i carry (up to i - 1,
    up to i); by_y: (T/C, B, H, C, .), less the gradient by what b_j, k_j carry; ends:
    (T/C, B, H, .), by the total of the chunk.
    """
    n, batch, _, _, size = by_x.shape[:5]
    dc = by_x[:, :, :, 1] - by_y
    dc[..., :-1, :] += by_x[:, :, :, 0, 1:]
    dc[..., -1, :] += ends
    dg = frame.cumulate.mT @ dc.transpose(2, 3).flatten(3)
    dg = dg.view(n, batch, size, *log_decay.shape[2:]).transpose(0, 1)
    return dg.reshape(batch, n * size, *log_decay.shape[2:])[:, :log_decay.shape[1]]


def _has_erase(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None,
               erase: Erase | None = None, state: Tensor | None = None,
               reset: Tensor | None = None, scale: float = 1.0) -> bool:
    return erase is not None and v.shape[1] > 0


def _chunk_size(log_decay: Tensor | None, length: int) -> int | None:
    """Steps in a chunk; None where decays are too strong for any chunk of products.

    Only decays of a channel limit it: they are split into two factors, one on each side.
    """
    size = 16 if length <= 16 else 32 if length <= 32 else CHUNK
    if log_decay is None or log_decay.ndim < 4:
        return size
    while size >= 1:
        worst = _chunks(log_decay.detach(), size).sum(2).amin()
        if float(worst) >= -LIMIT:
            return size
        size //= 2
    return None


@matrix_recurrence.path("chunked_delta", when=_has_erase)
def chunked_delta(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None,
                  erase: Erase | None = None, state: Tensor | None = None,
                  reset: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """`matrix_recurrence` with an erase term, in chunks; products in bfloat16 for bfloat16 input
    that is not small, else as inverses and states in float32 (float64 for float64 input)."""
    assert erase is not None
    batch, length, heads, value = v.shape
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    small = v.numel() * k.shape[-1] < SMALL
    dtype = torch.bfloat16 if v.dtype == torch.bfloat16 and not small else wide
    g: Tensor | None = None
    if log_decay is not None:
        g = log_decay.to(wide)
        g = g.expand(batch, length, heads) if g.ndim == 1 else g

    def per_head(x: Tensor) -> Tensor:
        x = x.to(dtype)
        return x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)

    if state is None:
        state = torch.zeros(batch, heads, k.shape[-1], value, dtype=wide, device=v.device)
    b = None if erase[1] is k else per_head(erase[1])
    if dtype == torch.bfloat16 and tiled_delta.applies(q, k, v, g, reset):
        return tiled_delta.tiled_delta(per_head(q), per_head(k), v, per_head(erase[0]), b, g,
                                       state.float(), reset, scale)
    if g is not None and wide == torch.float32:
        g = g.clamp(min=-LIMIT)  # beside any write, float32 has no digits for e^-60 of the rest
    size = _chunk_size(g, length)
    if size is None:
        return matrix_recurrence.reference(q, k, v, log_decay, erase, state, reset, scale)
    y, state = _ChunkedDelta.apply(per_head(q), per_head(k), v.to(dtype), per_head(erase[0]), b, g,
                                   state.to(wide), reset, scale, size)
    return y.to(v.dtype), state


def _is_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None,
             erase: Erase | None = None, state: Tensor | None = None,
             reset: Tensor | None = None, scale: float = 1.0) -> bool:
    return erase is not None and v.shape[1] == 1


@matrix_recurrence.path("delta_step", when=_is_step)
def delta_step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None,
               erase: Erase | None = None, state: Tensor | None = None,
               reset: Tensor | None = None, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """`matrix_recurrence` with an erase term for T = 1, as decoding needs it."""
    assert erase is not None
    batch, _, heads, value = v.shape
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32

    def column(x: Tensor) -> Tensor:
        x = x.to(wide)
        x = x if x.shape[2] == heads else x.repeat_interleave(heads // x.shape[2], dim=2)
        return x.view(batch, heads, -1, 1) if x.is_contiguous() else x[:, 0, :, :, None]

    with torch.autocast(v.device.type, enabled=False):
        q_, k_, a_, row = column(q), column(k), column(erase[0]), column(v).mT
        if state is None:
            s = k_ * row
        else:
            s = state.to(wide)
            if reset is not None:
                s = s.masked_fill(reset[:, :, None, None], 0)
            u = a_.mT @ s
            if log_decay is not None:
                g = log_decay if log_decay.ndim == 1 else log_decay[:, 0]
                s = s * g.to(wide).exp().reshape(*(1,) * (2 - g.ndim), *g.shape,
                                                 *(1,) * (4 - max(g.ndim, 2)))
            s = s + (k_ * (u + row) if erase[1] is k else column(erase[1]) * u + k_ * row)
        y = (q_.mT @ s).mT.view(batch, 1, heads, value)
        return (y if scale == 1.0 else y * scale).to(v.dtype), s
