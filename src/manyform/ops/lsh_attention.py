"""Attention inside buckets of a locality-sensitive hash, by sorting.

Forms: `sorted` puts the keys of every bucket side by side and attends to intervals of them
(`manyform.ops.sparse_attention`), `chunks` compares chunk with chunk; the references compare every
pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from manyform.ops.operation import operation
from manyform.ops.sparse_attention import sparse_attention


def _flops(q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, start: Tensor | None, *, chunk: int,
           causal: bool) -> int:
    batch, heads, length, d = q.shape
    return 4 * d * batch * heads * buckets.shape[2] * length * 2 * chunk


def _begins(start: Tensor | None, batch: int, length: int, keys: int,
            device: torch.device) -> Tensor:
    """Where the document of every key begins, (batch, keys); -1 for keys before the first query's
    document."""
    if start is None:
        return torch.zeros(batch, keys, dtype=torch.int64, device=device)
    held = torch.arange(keys - length, device=device)
    first = start[:, :1].expand(-1, keys - length)
    return torch.cat([torch.where(held >= first, first, -1), start], 1).expand(batch, -1)


@operation(flops=_flops)
def lsh_attention(q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, start: Tensor | None, *,
                  chunk: int, causal: bool) -> Tensor:
    """y_i = sum over rounds and j in P_i of p_ij v_j, p_i = softmax of q_i.k_j over all of these
    (Kitaev 2020, "Reformer", eq. 2 and 4; a key found in several rounds counts for each).

    q: (B, H, T, D); k, v: (B, H, S, D), whose last T belong to the queries. buckets: (B, H, R, S)
    int64, the bucket of each key in R rounds. start: (B or 1, T) or None (all 0): where the query's
    document begins among the keys.
    P_i holds tokens of the query's document and bucket other than i, and i itself only where no
      round has another. causal: the last 2 `chunk` of them before i. Else, with the document sorted
      by bucket and cut into chunks of `chunk`, those in the chunk of i and in the one before it
      (section 2, eq. 5).
    The operations are counted as 2 chunk keys for every query and round, which is the most.
    Returns (B, H, T, D) in the dtype of v.
    """
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    batch, _, length, _ = q.shape
    keys = k.shape[2]
    begin = _begins(start, batch, length, keys, q.device)[:, None]
    place = torch.arange(keys, device=q.device)
    own = place[keys - length:, None]
    same_document = begin[..., keys - length:, None] == begin[..., None, :]
    times = torch.zeros(*q.shape[:3], keys, dtype=wide, device=q.device)
    for bucket in buckets.unbind(2):
        mine = bucket[..., keys - length:, None]
        seen = same_document & (mine == bucket[..., None, :])
        if causal:
            seen &= place < own
            later = seen.flip(-1).cumsum(-1).flip(-1)  # in the bucket, from j to i
            seen &= later <= 2 * chunk
        else:
            before = (bucket[..., None, :] < mine) | ((bucket[..., None, :] == mine)
                                                      & (place < own))
            group = (before & same_document).sum(-1) // chunk
            gap = group[..., None] - group[..., None, :]
            seen &= (place != own) & (gap >= 0) & (gap <= 1)
        times += seen
    times += (times.sum(-1, keepdim=True) == 0) & (place == own)
    score = q.to(wide) @ k.to(wide).mT
    return ((score + times.log()).softmax(-1) @ v.to(wide)).to(v.dtype)


@lsh_attention.path("sorted")
def _(q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, start: Tensor | None, *, chunk: int,
      causal: bool) -> Tensor:
    batch, heads, length, d = q.shape
    rounds, keys = buckets.shape[2:]
    begin = _begins(start, batch, length, keys, q.device)[:, None, None]
    label = begin * (int(buckets.max()) + 1) + buckets  # sorts by document, then by bucket
    sorted_label, order = label.sort(dim=3, stable=True)
    place = torch.arange(keys, device=q.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(3, order, place)
    edge = torch.ones_like(sorted_label, dtype=torch.bool)
    edge[..., 1:] = sorted_label[..., 1:] != sorted_label[..., :-1]
    group = torch.where(edge, place, 0).cummax(3).values.gather(3, rank)[..., keys - length:]
    rank = rank[..., keys - length:]
    if causal:
        seen = [(torch.maximum(group, rank - 2 * chunk), rank)]
    else:
        last = torch.cat([edge[..., 1:], edge[..., :1]], 3)
        end = torch.where(last, place + 1, keys).flip(3).cummin(3).values.flip(3)
        end = end.gather(3, torch.empty_like(order).scatter_(3, order, place))
        chunks = begin + (rank - begin) // chunk * chunk
        seen = [(torch.maximum(group, chunks - chunk), rank),
                (rank + 1, torch.minimum(end, chunks + chunk))]
    shift = keys * torch.arange(rounds, device=q.device)[:, None]
    low, high = (torch.cat([pair[i] + shift for pair in seen], 2) for i in (0, 1))
    alone = ~(low < high).any(2)
    first = rank[:, :, 0]
    low = torch.cat([low, first[:, :, None]], 2).movedim(2, -1)
    high = torch.cat([high, (first + alone)[:, :, None]], 2).movedim(2, -1)
    index = order.flatten(2)[..., None].expand(-1, -1, -1, d)
    return sparse_attention(q, k.gather(2, index), v.gather(2, index), low, high, scale=1.0)


def _chunked_flops(q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, *, chunk: int, multiple: int,
                   ) -> int:
    batch, heads, length, d = q.shape
    return 4 * d * batch * heads * buckets.shape[2] * length * 2 * chunk


@operation(flops=_chunked_flops)
def chunked_lsh_attention(q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, *, chunk: int,
                          multiple: int) -> Tensor:
    """y_i = sum over j < i of n_ij p_ij v_j, p_i = softmax of q_i.k_j where j counts n_ij times:
    attention in chunks of the sorted sequence as Reformer's released code has it.

    q, k, v: (B, H, T, D). buckets: (B, H, R, T) int64, of each token in R rounds. In every round
    the tokens are sorted by bucket, and filled up to a multiple of `multiple`; the rounds lie one
    behind the other and are cut into chunks of `chunk`. n_ij says how often j stands in a chunk of
    i's or in the chunk before one, in whatever bucket and round (before the first chunk lies the
    last). i itself counts only where there is no other. The operations are counted as 2 chunk keys
    for every query and round.
    Returns (B, H, T, D) in the dtype of v.
    """
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    length, rounds = q.shape[2], buckets.shape[2]
    filled = -(-length // multiple) * multiple
    rank = buckets.argsort(dim=3, stable=True).argsort(dim=3)
    mine = (rank + filled * torch.arange(rounds, device=q.device)[:, None]) // chunk
    times = torch.zeros(*q.shape[:3], length, dtype=wide, device=q.device)
    for own in mine.unbind(2):
        for other in mine.unbind(2):
            gap = (own[..., :, None] - other[..., None, :]) % (rounds * filled // chunk)
            times += gap <= 1
    place = torch.arange(length, device=q.device)
    times *= place[:, None] > place
    times += (times.sum(-1, keepdim=True) == 0) & (place[:, None] == place)
    score = q.to(wide) @ k.to(wide).mT
    return ((score + times.log()).softmax(-1) @ v.to(wide)).to(v.dtype)


NEVER = -1e30
"""The score of a pair that is not seen; finite, so that no gradient is NaN."""


@chunked_lsh_attention.path("chunks")
def _(q: Tensor, k: Tensor, v: Tensor, buckets: Tensor, *, chunk: int, multiple: int) -> Tensor:
    wide = torch.float64 if v.dtype == torch.float64 else torch.float32
    batch, heads, length, d = q.shape
    rounds = buckets.shape[2]
    filled = -(-length // multiple) * multiple
    order = buckets.argsort(dim=3, stable=True)
    place = torch.nn.functional.pad(order, (0, filled - length), value=length).flatten(2)
    index = place.clamp(max=length - 1)[..., None].expand(-1, -1, -1, d)
    q_, k_, v_ = (x.to(wide).gather(2, index).unflatten(2, (-1, chunk)) for x in (q, k, v))
    place = place.unflatten(2, (-1, chunk))
    k_, v_, seen = (torch.cat([x.roll(1, dims=2), x], dim=3) for x in (k_, v_, place))
    score = (q_ @ k_.mT).masked_fill(seen[..., None, :] >= place[..., None], NEVER)
    total = score.logsumexp(-1)
    y = (score - total[..., None]).exp() @ v_
    slot = torch.empty_like(order).scatter_(3, order, torch.arange(
        length, device=q.device).expand_as(order))
    slot = (slot + filled * torch.arange(rounds, device=q.device)[:, None]).flatten(2)
    y = y.flatten(2, 3).gather(2, slot[..., None].expand(-1, -1, -1, d))
    total = total.flatten(2).gather(2, slot).unflatten(2, (rounds, length))
    y = (y.unflatten(2, (rounds, length)) * total.softmax(2)[..., None]).sum(2)
    alone = (total < NEVER / 2).all(2)[..., None]
    return torch.where(alone, v.to(wide), y).to(v.dtype)


def hash_buckets(x: Tensor, rotations: Tensor, factors: Sequence[int] | None = None) -> Tensor:
    """h(x) = argmax([x R; -x R]) for each round's R (Andoni 2015; Kitaev 2020, section 2).

    x: (B, H, T, D); rotations: (R, D, buckets / 2), or (H, R, D, buckets / 2) where every head has
    its own. factors: the bucket is h_1 + f_1 (h_2 + f_2 (...)), each h from its own f / 2 columns
    of the rotations (released code, for many buckets). Returns (B, H, R, T) int64; computed in
    float32 (float64 for float64 input), whatever autocast says, since it decides who sees whom.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rounds, d, half = rotations.shape[-3:]
    flat = rotations.to(wide).transpose(-3, -2).reshape(*rotations.shape[:-3], d, rounds * half)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        turned = x.to(wide) @ flat
        turned = turned.unflatten(-1, (rounds, half)).transpose(2, 3)
        sizes = [2 * half] if factors is None else list(factors)
        parts = turned.split([n // 2 for n in sizes], -1)
        found = torch.zeros(turned.shape[:-1], dtype=torch.int64, device=x.device)
        for i, part in enumerate(parts):
            found += math.prod(sizes[:i]) * torch.cat([part, -part], -1).argmax(-1)
        return found
