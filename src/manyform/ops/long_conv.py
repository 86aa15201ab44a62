"""Causal convolution of a sequence with a filter as long as the sequence, one filter a channel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from manyform.ops.kernels import threads, usable
from manyform.ops.operation import operation

SHORT = 64
"""Up to this length a Toeplitz matrix a channel is faster than Fourier transforms."""
CACHED = 1 << 19
"""Numbers in flight at once between the transforms of a CPU."""
TILED = range(256, 16385)
"""Lengths for which the T^2 operations of matrix tiles take less time than T log T others."""


def fast_size(n: int) -> int:
    """The smallest 2^a 3^b 5^c that is at least n: sizes that Fourier transforms like."""
    best = 1 << (n - 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            best = min(best, three << max(0, -(-n // three) - 1).bit_length())
            three *= 3
        five *= 5
    return best


def long_conv_flops(batch: int, length: int, channels: int) -> int:
    """Operations of the Fourier form: real transforms of size n = 2 length, 5/2 n log2 n each, of
    the input, the filter (once for all rows) and the product, and n / 2 complex products (3 n)."""
    n = 2 * length
    transform = 5 * n * math.log2(n) / 2
    return round(channels * ((2 * batch + 1) * transform + batch * 3 * n))


def _flops(x: Tensor, k: Tensor, reset: Tensor | None = None) -> int:
    return long_conv_flops(*x.shape)


@operation(flops=_flops)
def long_conv(x: Tensor, k: Tensor, reset: Tensor | None = None) -> Tensor:
    """y_t = sum_{s <= t} k_{t-s} x_s, channel by channel, s not before the document of t begins.

    Romero 2022 (CKConv, eq. 3); Poli 2023 (Hyena, section 2.1). The Fourier form (Cooley & Tukey
    1965) needs O(T log T) operations; its rounding, about 1e-7 of the largest term, reaches every
    output of a document, the ones before an input included.

    x: (B, T, D); k: (D, L) filters, zero from L on (L may be shorter or longer than T);
    reset: (B, T) bool, true where a document begins. Returns y: (B, T, D) in the dtype of x,
    computed in float32 (float64 for float64 input).
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_, k_ = x.to(wide), k.to(wide)
    y = torch.zeros_like(x_)
    keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    for lag in range(min(x.shape[1], k.shape[1])):
        if lag > 0:  # x_{t-lag} is kept while no document begins in (t - lag, t]
            x_ = F.pad(x_, (0, 0, 1, 0))[:, :-1]
            keep = F.pad(keep, (1, 0))[:, :-1]
            if reset is not None:
                keep = keep & ~reset
        y = y + torch.where(keep[..., None], k_[:, lag] * x_, 0)
    return y.to(x.dtype)


@long_conv.path("fft")
def _fourier(x: Tensor, k: Tensor, reset: Tensor | None = None) -> Tensor:
    """Fourier transforms; matrices for documents of up to `SHORT` tokens."""
    if reset is not None and bool(reset[:, 1:].any()):
        return _by_document(x, k, reset)
    with torch.autocast(x.device.type, enabled=False):
        if x.shape[1] <= SHORT:
            return _toeplitz(x, k)
        return _FourierConv.apply(x, k[:, :x.shape[1]])


def _toeplitz(x: Tensor, k: Tensor) -> Tensor:
    length = x.shape[1]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    k_ = F.pad(k.to(wide)[:, :length], (length - 1, max(0, length - k.shape[1])))
    matrix = k_.unfold(1, length, 1).flip(1)  # [d, s, t] = k_{t-s}
    return torch.einsum("bsd,dst->btd", x.to(wide), matrix).to(x.dtype)


def _by_document(x: Tensor, k: Tensor, reset: Tensor) -> Tensor:
    """Each document as a row of its own; rows of like length (within a factor of two) together."""
    batch, length, d = x.shape
    begins = reset.clone()
    begins[:, 0] = True
    first = begins.flatten().nonzero().flatten()
    lengths = torch.diff(first, append=first.new_tensor([batch * length]))
    classes = torch.ceil(torch.log2(lengths.clamp(min=8).double())).long()
    flat, y = x.reshape(-1, d), x.new_zeros(batch * length, d)
    for c in classes.unique().tolist():
        members = classes == c
        steps = torch.arange(int(lengths[members].max()), device=x.device)
        inside = steps < lengths[members][:, None]
        place = torch.where(inside, first[members][:, None] + steps, 0)
        rows = torch.where(inside[..., None], flat[place], 0)
        y = y.index_put((place[inside],), _fourier(rows, k)[inside])
    return y.view(batch, length, d)


class _FourierConv(torch.autograd.Function):
    """y = F^-1(F(x) F(k)) with zeros behind both; the gradients are the two correlations.

    A few channels at a time, so that what passes between the transforms stays in the cache; on
    the way back the transforms of x and k are worked out again, which is cheaper than to keep them.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(x, k)
        length, y = x.shape[1], torch.empty_like(x, memory_format=torch.contiguous_format)
        n = fast_size(length + k.shape[1] - 1)
        for part in _slices(x, n):
            product = _spectrum(x[..., part], n) * torch.fft.rfft(k[part].to(_wide(x)), n=n)
            y[..., part] = torch.fft.irfft(product, n=n)[..., :length].transpose(1, 2)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, k = ctx.saved_tensors
        (g,) = grads
        length, width = x.shape[1], k.shape[1]
        n = fast_size(length + width - 1)
        dx = torch.empty_like(g, memory_format=torch.contiguous_format)
        dk = torch.empty_like(k, memory_format=torch.contiguous_format)
        for part in _slices(x, n):
            gf = _spectrum(g[..., part], n)
            if ctx.needs_input_grad[0]:
                product = gf * torch.fft.rfft(k[part].to(_wide(x)), n=n).conj()
                dx[..., part] = torch.fft.irfft(product, n=n)[..., :length].transpose(1, 2)
            if ctx.needs_input_grad[1]:
                product = (gf * _spectrum(x[..., part], n).conj()).sum(0)
                dk[part] = torch.fft.irfft(product, n=n)[..., :width]
        return (dx if ctx.needs_input_grad[0] else None,
                dk if ctx.needs_input_grad[1] else None)


def _slices(x: Tensor, n: int) -> list[slice]:
    """Groups of channels: on a CPU of about two megabytes each, elsewhere all of them."""
    channels = x.shape[2]
    step = max(1, CACHED // (x.shape[0] * n)) if x.device.type == "cpu" else channels
    return [slice(c, c + step) for c in range(0, channels, step)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _spectrum(x: Tensor, n: int) -> Tensor:
    """(B, T, D) -> the transform along T, zeros behind, (B, D, n / 2 + 1) complex."""
    # Widen first: transposed copies of bfloat16 are several times slower than of float32.
    wide = x.to(_wide(x), memory_format=torch.contiguous_format)
    return torch.fft.rfft(wide.transpose(1, 2).contiguous(), n=n)


def _tileable(x: Tensor, k: Tensor, reset: Tensor | None = None) -> bool:
    """bfloat16 on a CPU with matrix tiles, documents not packed."""
    if not (x.dtype == torch.bfloat16 and x.shape[1] in TILED and x.shape[2] % 16 == 0
            and usable(x, k) and (reset is None or not bool(reset[:, 1:].any()))):
        return False
    from manyform.ops.kernels.tiles import supported
    return supported()


@long_conv.path("tiles", when=_tileable)
def _tiled(x: Tensor, k: Tensor, reset: Tensor | None = None) -> Tensor:
    """Products of matrix tiles, k in bfloat16, sums in float32: see `kernels.long_conv`."""
    return _TiledConv.apply(x, _by_time(k, x.shape[1]))


def _by_time(k: Tensor, length: int) -> Tensor:
    """k (D, L) -> (T, D) in bfloat16, contiguous: no copy where it is already so."""
    k = k[:, :length]
    if k.shape[1] < length:
        k = F.pad(k, (0, length - k.shape[1]))
    return k.T.to(torch.bfloat16).contiguous()


def _scratch(n: int, copies: int) -> tuple[Any, Any, Any]:
    from manyform.ops.kernels.long_conv import scratch
    workers = threads()
    floats, words, halves = scratch(n, copies)
    return (torch.empty(workers, floats).numpy(),
            torch.empty(workers, words, dtype=torch.int32).numpy().view("u4"),
            torch.empty(workers, halves, dtype=torch.int16).numpy().view("u2"))


def _convolve(x: Tensor, k: Tensor, reach: Tensor | None = None) -> Tensor:
    from manyform.ops.kernels import long_conv as kernels
    from manyform.ops.kernels.lanes import flat
    y, n = torch.empty_like(x), kernels.padded(x.shape[1])
    kernels.forward(flat(x), flat(k), _groups(reach, x), flat(y), tuple(x.shape), n,
                    *_scratch(n, 1))
    return y


def _groups(reach: Tensor | None, x: Tensor) -> Any:
    """The largest reach of each sixteen channels, at most the length of x (B, T, D)."""
    if reach is None:
        return torch.full((x.shape[2] // 16,), x.shape[1]).numpy()
    return reach.view(-1, 16).amax(1).clamp(max=x.shape[1]).numpy()


def _gradients(g: Tensor, x: Tensor, k: Tensor, reach: Tensor | None = None,
               ) -> tuple[Tensor, Tensor]:
    from manyform.ops.kernels import long_conv as kernels
    from manyform.ops.kernels.lanes import flat
    dx, dk, n = torch.empty_like(x), torch.empty_like(k), kernels.padded(x.shape[1])
    kernels.backward(flat(g), flat(x), flat(k), _groups(reach, x), flat(dx), flat(dk),
                     tuple(x.shape), n, *_scratch(n, min(x.shape[0], 2)))
    return dx, dk


class _TiledConv(torch.autograd.Function):
    """x (B, T, D) and k (T, D), bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, k: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, k)
        return _convolve(x, k)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return _gradients(g.contiguous(), *ctx.saved_tensors)


def _gated_flops(u: Tensor, k: Tensor, reach: Tensor | None = None) -> int:
    return long_conv_flops(u.shape[0], u.shape[1], u.shape[2] // 3)


@operation(flops=_gated_flops)
def gated_conv(u: Tensor, k: Tensor, reach: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y = x0 * long_conv(z, k) and z = x1 * v, with u = (x0, x1, v) side by side.

    The Hyena operator of order 2 (Poli 2023, definition 3.1) for whole sequences.
    u: (B, T, 3 D); k: (D, L), L at least T; reach: (D,) int64, where from k is zero for good, so
    that no gradient of it is asked for there, or None. Returns y, z: (B, T, D) in the dtype of u.
    """
    x0, x1, v = u.chunk(3, dim=-1)
    z = x1 * v
    return x0 * long_conv(z, k), z


def _gates_tileable(u: Tensor, k: Tensor, reach: Tensor | None = None) -> bool:
    return u.shape[2] % 48 == 0 and _tileable(u, k)


@gated_conv.path("tiles", when=_gates_tileable)
def _gated_tiles(u: Tensor, k: Tensor, reach: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The convolution on tiles between two passes over memory."""
    y, z = _GatedConv.apply(u, _by_time(k, u.shape[1]), reach)
    return y, z


class _GatedConv(torch.autograd.Function):
    """u (B, T, 3 D) and k (T, D), bfloat16."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, k: Tensor, reach: Tensor | None) -> tuple[Tensor, Tensor]:
        from manyform.ops.kernels import long_conv as kernels
        from manyform.ops.kernels.lanes import flat
        u = u.contiguous()
        batch, length, width = u.shape[0], u.shape[1], k.shape[1]
        z, y = (u.new_empty(batch, length, width) for _ in range(2))
        u_ = flat(u)
        threads()
        kernels.multiply(u_, 3 * width, width, u_, 3 * width, 2 * width, batch * length, width,
                         flat(z))
        conv = _convolve(z, k, reach)
        kernels.multiply(u_, 3 * width, 0, flat(conv), width, 0, batch * length, width, flat(y))
        ctx.save_for_backward(u, k, z, conv, reach)
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dz_too: Tensor | None,
                 ) -> tuple[Tensor | None, ...]:
        from manyform.ops.kernels import long_conv as kernels
        from manyform.ops.kernels.lanes import flat
        u, k, z, conv, reach = ctx.saved_tensors
        rows, width = z.shape[0] * z.shape[1], z.shape[2]
        dy = torch.zeros_like(z) if dy is None else dy.to(z.dtype).contiguous()
        too = z.new_empty(0) if dz_too is None else dz_too.to(z.dtype).contiguous()
        du, g = torch.empty_like(u), torch.empty_like(z)
        threads()
        kernels.open_gates(flat(dy), flat(u), flat(conv), rows, width, flat(du), flat(g))
        dz, dk = _gradients(g, z, k, reach)
        kernels.close_gates(flat(dz), flat(too), flat(u), rows, width, flat(du))
        return du, dk, None
