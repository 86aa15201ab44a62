"""Shift-reduce composition and its gradient for the CPU: the rows of a batch go step by step
together, so that four of them share every read of the weights.

A node [h; c] takes two rows of `size` features, whole vectors. Gates take five, i, f_l, f_r, o and
g, and as many zeros as make `wide` a multiple of BLOCK. W [h_l; h_r] is a sum of two products; that
of a left child is kept beside its slot of the stack, so that a node is multiplied once however
often it is composed, and the leaves are multiplied before the loop, all at once.

A row of `links` tells of a step: where the nodes on top, below and beneath came from (the step that
made them, NONE, or -2 - s for slot s of the stack at the call), and flags.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from manyform.ops.kernels.lanes import FAST, WIDTH, load, sigmoid, splat, store, total

BLOCK = 4 * WIDTH
LINKS = 4
NONE = -1
_JOINED, _FREE_JOIN, _REDUCED, _FREE_REDUCE = 1, 2, 4, 8


@numba.njit(fastmath=FAST, inline="always")
def _store4(y, at, a, b, c, d):
    store(y, at, a)
    store(y, at + WIDTH, b)
    store(y, at + 2 * WIDTH, c)
    store(y, at + 3 * WIDTH, d)


@numba.njit(fastmath=FAST)
def _product1(weights, start, count, width, x, a, y, p):
    """y[p:] = start + sum_j x[a + j] W_j, `width` numbers. weights: (width / BLOCK, count,
    BLOCK)."""
    w = 0
    for o in range(0, width, BLOCK):
        y0, y1 = load(start, o), load(start, o + WIDTH)
        y2, y3 = load(start, o + 2 * WIDTH), load(start, o + 3 * WIDTH)
        for j in range(count):
            v = splat(x[a + j])
            y0 = y0 + load(weights, w) * v
            y1 = y1 + load(weights, w + WIDTH) * v
            y2 = y2 + load(weights, w + 2 * WIDTH) * v
            y3 = y3 + load(weights, w + 3 * WIDTH) * v
            w += BLOCK
        _store4(y, p + o, y0, y1, y2, y3)


@numba.njit(fastmath=FAST)
def _product4(weights, start, count, width, x, a, b, c, d, y, p, q, r, s):
    """Four of `_product1`, which read the weights once."""
    w = 0
    for o in range(0, width, BLOCK):
        a0, a1 = load(start, o), load(start, o + WIDTH)
        a2, a3 = load(start, o + 2 * WIDTH), load(start, o + 3 * WIDTH)
        b0, b1, b2, b3 = a0, a1, a2, a3
        c0, c1, c2, c3 = a0, a1, a2, a3
        d0, d1, d2, d3 = a0, a1, a2, a3
        for j in range(count):
            w0, w1 = load(weights, w), load(weights, w + WIDTH)
            w2, w3 = load(weights, w + 2 * WIDTH), load(weights, w + 3 * WIDTH)
            v = splat(x[a + j])
            a0, a1, a2, a3 = a0 + w0 * v, a1 + w1 * v, a2 + w2 * v, a3 + w3 * v
            v = splat(x[b + j])
            b0, b1, b2, b3 = b0 + w0 * v, b1 + w1 * v, b2 + w2 * v, b3 + w3 * v
            v = splat(x[c + j])
            c0, c1, c2, c3 = c0 + w0 * v, c1 + w1 * v, c2 + w2 * v, c3 + w3 * v
            v = splat(x[d + j])
            d0, d1, d2, d3 = d0 + w0 * v, d1 + w1 * v, d2 + w2 * v, d3 + w3 * v
            w += BLOCK
        _store4(y, p + o, a0, a1, a2, a3)
        _store4(y, q + o, b0, b1, b2, b3)
        _store4(y, r + o, c0, c1, c2, c3)
        _store4(y, s + o, d0, d1, d2, d3)


@numba.njit(fastmath=FAST)
def _products(weights, start, count, width, x, sources, y, targets, pairs):
    """`_product1` from every source to its target."""
    done = 0
    while pairs - done > 1:
        i, j, k = done + 1, min(done + 2, pairs - 1), min(done + 3, pairs - 1)
        _product4(weights, start, count, width, x, sources[done], sources[i], sources[j],
                  sources[k], y, targets[done], targets[i], targets[j], targets[k])
        done += 4
    if done < pairs:
        _product1(weights, start, count, width, x, sources[done], y, targets[done])


@numba.njit(fastmath=FAST)
def _tanh(v):
    two = splat(np.float32(2))
    return two * sigmoid(two * v) - splat(np.float32(1))


@numba.njit(fastmath=FAST)
def _compose(left, a, right, b, x, p, y, q, into, gates, g, keep, size):
    """into = the node of gates left + right, and of the children x[p:] and y[q:]."""
    for v in range(0, size, WIDTH):
        i = sigmoid(load(left, a + v) + load(right, b + v))
        f = sigmoid(load(left, a + size + v) + load(right, b + size + v))
        r = sigmoid(load(left, a + 2 * size + v) + load(right, b + 2 * size + v))
        o = sigmoid(load(left, a + 3 * size + v) + load(right, b + 3 * size + v))
        z = _tanh(load(left, a + 4 * size + v) + load(right, b + 4 * size + v))
        c = f * load(x, p + size + v) + r * load(y, q + size + v) + i * z
        store(into, v, o * _tanh(c))
        store(into, size + v, c)
        if keep:
            store(gates, g + v, i)
            store(gates, g + size + v, f)
            store(gates, g + 2 * size + v, r)
            store(gates, g + 3 * size + v, o)
            store(gates, g + 4 * size + v, z)


@numba.njit(fastmath=FAST)
def _decompose(gates, g, x, p, y, q, dh, h, dc, c, dgates, into, dx, s, dy, t, size):
    """The gradient of `_compose`: from dh[h:] and dc[c:] to dgates[into:], and to the cells of the
    children, added to dx[s:] and dy[t:]."""
    one = splat(np.float32(1))
    for v in range(0, size, WIDTH):
        i, f = load(gates, g + v), load(gates, g + size + v)
        r, o = load(gates, g + 2 * size + v), load(gates, g + 3 * size + v)
        z = load(gates, g + 4 * size + v)
        left, right = load(x, p + size + v), load(y, q + size + v)
        bent = _tanh(f * left + r * right + i * z)
        by_h = load(dh, h + v)
        by_c = load(dc, c + v) + by_h * o * (one - bent * bent)
        store(dgates, into + v, by_c * z * i * (one - i))
        store(dgates, into + size + v, by_c * left * f * (one - f))
        store(dgates, into + 2 * size + v, by_c * right * r * (one - r))
        store(dgates, into + 3 * size + v, by_h * bent * o * (one - o))
        store(dgates, into + 4 * size + v, by_c * i * (one - z * z))
        store(dx, s + size + v, load(dx, s + size + v) + by_c * f)
        store(dy, t + size + v, load(dy, t + size + v) + by_c * r)


@numba.njit(fastmath=FAST)
def _gain(gates, g, x, p, y, q, kept, k, d, at, size):
    """d . (composed - kept): what a decision to compose is worth."""
    sums = splat(np.float32(0))
    for v in range(0, size, WIDTH):
        c = (load(gates, g + size + v) * load(x, p + size + v)
             + load(gates, g + 2 * size + v) * load(y, q + size + v)
             + load(gates, g + v) * load(gates, g + 4 * size + v))
        h = load(gates, g + 3 * size + v) * _tanh(c)
        sums = sums + load(d, at + v) * (h - load(kept, k + v))
        sums = sums + load(d, at + size + v) * (c - load(kept, k + size + v))
    return total(sums)


@numba.njit(fastmath=FAST, inline="always")
def _chance(logit):
    return np.float32(1) / (np.float32(1) + math.exp(-logit))


@numba.njit(fastmath=FAST)
def _copy(x, a, y, b, count):
    for v in range(0, count, WIDTH):
        store(y, b + v, load(x, a + v))


@numba.njit(fastmath=FAST)
def _add(x, a, scale, y, b, count):
    for v in range(0, count, WIDTH):
        store(y, b + v, load(y, b + v) + splat(scale) * load(x, a + v))


@numba.njit(fastmath=FAST)
def _said(score, which, x, a, y, b, size):
    """The score of a decision about the nodes x[a:] and y[b:]. score: (2, 2 size), then the
    biases."""
    w, sums = which * 2 * size, splat(np.float32(0))
    for v in range(0, size, WIDTH):
        sums = sums + load(score, w + v) * load(x, a + v)
        sums = sums + load(score, w + size + v) * load(y, b + v)
    return total(sums) + score[4 * size + which]


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def forward(leaf, right, to_left, to_right, bias, joins, reduces, score, reset, stack, depth, owner,
            y, nodes, made, gates, chances, links, dims):
    """leaf: flat (B, T, 2 size); right: flat (B, T, wide), W_r h + b of the leaves; to_left,
    to_right: see `_product1`; bias: (wide,); joins, reduces, reset: (B, T) bool or empty; score:
    see `_said`, or empty; stack: flat (B, D, 2 size) and depth: (B,) int64, before at the call and
    after at the end; owner: (B, D) int32, the links of the last stack's nodes; y: flat
    (B, T, 2 size).
    For the gradient, else empty: nodes and made, flat (B, T, 2 size), what the first decision and
    the second left on top; gates: flat (B, T, 2, wide); chances: (B, T, 2); links: (B, T, LINKS).
    """
    batch, length, slots, size, wide, groups = dims
    node, keep, scored = 2 * size, nodes.size > 0, score.size > 0
    for group in numba.prange(groups):
        low, high = group * batch // groups, (group + 1) * batch // groups
        rows = high - low
        lefts = np.empty(rows * slots * wide, np.float32)  # of the stack's nodes as left children
        ready = np.zeros((rows, slots), np.bool_)
        rights, zeros = np.empty(rows * wide, np.float32), np.zeros(wide, np.float32)
        tops, joined = np.empty(rows * node, np.float32), np.empty(node, np.float32)
        yes, wanted = np.zeros(rows, np.bool_), np.zeros(rows, np.bool_)
        place = np.zeros(rows, np.int64)
        sources, targets = np.zeros(2 * rows, np.int64), np.zeros(2 * rows, np.int64)
        for r in range(rows):
            for s in range(slots):
                owner[low + r, s] = -2 - s
        for t in range(length):
            pairs = 0
            for r in range(rows):  # the first decision
                row = low + r
                if reset.size > 0 and reset[row, t]:
                    depth[row] = 0
                n, step = depth[row], row * length + t
                place[r] = min(n, slots) - 1
                yes[r], wanted[r] = False, False
                if n == 0:
                    continue
                at, free = (row * slots + place[r]) * node, scored and n < slots
                if scored:
                    logit = _said(score, 0, stack, at, leaf, step * node, size)
                    yes[r] = logit >= 0
                    if keep:
                        chances[row, t, 0] = _chance(logit)
                else:
                    yes[r] = joins[row, t]
                wanted[r] = yes[r] or n >= slots or (free and keep)
                if free and keep:
                    links[row, t, 3] |= _FREE_JOIN
                if wanted[r] and not ready[r, place[r]]:
                    sources[pairs], targets[pairs] = at, (r * slots + place[r]) * wide
                    ready[r, place[r]] = True
                    pairs += 1
            _products(to_left, zeros, size, wide, stack, sources, lefts, targets, pairs)

            pairs = 0
            for r in range(rows):  # its node, and the second decision
                row = low + r
                n, step = depth[row], row * length + t
                takes = wanted[r] and (yes[r] or n >= slots)
                if wanted[r]:
                    _compose(lefts, (r * slots + place[r]) * wide, right, step * wide, stack,
                             (row * slots + place[r]) * node, leaf, step * node, joined, gates,
                             2 * step * wide, keep, size)
                if takes:
                    _copy(joined, 0, tops, r * node, node)
                else:
                    _copy(leaf, step * node, tops, r * node, node)
                if keep:
                    links[row, t, 0] = owner[row, place[r]] if n > 0 else NONE
                    if takes:
                        links[row, t, 3] |= _JOINED
                    _copy(tops, r * node, nodes, step * node, node)
                if not yes[r]:
                    n += 1
                depth[row], place[r] = n, min(n, slots) - 1
                yes[r], wanted[r] = False, False
                if n < 2:
                    continue
                at = (row * slots + place[r] - 1) * node
                if scored:
                    logit = _said(score, 1, stack, at, tops, r * node, size)
                    yes[r] = logit >= 0
                    if keep:
                        chances[row, t, 1] = _chance(logit)
                else:
                    yes[r] = reduces[row, t]
                if n > slots:
                    continue
                wanted[r] = yes[r] or (scored and keep)
                if scored and keep:
                    links[row, t, 3] |= _FREE_REDUCE
                if wanted[r] and takes:
                    sources[pairs], targets[pairs] = r * node, r * wide
                    pairs += 1
                elif wanted[r]:
                    _copy(right, step * wide, rights, r * wide, wide)
            _products(to_right, bias, size, wide, tops, sources, rights, targets, pairs)
            pairs = 0
            for r in range(rows):
                under = place[r] - 1
                if wanted[r] and not ready[r, under]:
                    sources[pairs] = ((low + r) * slots + under) * node
                    targets[pairs] = (r * slots + under) * wide
                    ready[r, under] = True
                    pairs += 1
            _products(to_left, zeros, size, wide, stack, sources, lefts, targets, pairs)

            for r in range(rows):  # the new top
                row = low + r
                n, step, under = depth[row], row * length + t, place[r] - 1
                if keep:
                    links[row, t, 1] = owner[row, under] if n > 1 else NONE
                if wanted[r]:
                    _compose(lefts, (r * slots + under) * wide, rights, r * wide, stack,
                             (row * slots + under) * node, tops, r * node, joined, gates,
                             (2 * step + 1) * wide, keep, size)
                if yes[r]:
                    depth[row] = n - 1
                    if wanted[r]:
                        _copy(joined, 0, tops, r * node, node)
                        place[r] = under
                        if keep:
                            links[row, t, 3] |= _REDUCED
                at = (row * slots + place[r]) * node
                _copy(tops, r * node, stack, at, node)
                _copy(tops, r * node, y, step * node, size)
                ready[r, place[r]], owner[row, place[r]] = False, t
                if depth[row] > 1:
                    _copy(stack, at - node, y, step * node + size, size)
                else:
                    _copy(zeros, 0, y, step * node + size, size)
                if keep:
                    links[row, t, 2] = owner[row, place[r] - 1] if depth[row] > 1 else NONE
                    _copy(tops, r * node, made, step * node, node)


@numba.njit(fastmath=FAST, inline="always")
def _where(link, row, length, slots):
    """Index of a node by its link, among those that steps made or among those at the call."""
    return row * length + link if link >= 0 else row * slots - 2 - link


@numba.njit(parallel=True, fastmath=FAST, cache=True)
def backward(leaf, stack, nodes, made, gates, chances, links, from_left, from_right, score, dy,
             dstack, dmade, dleft, dleft0, dright, dnode, dleaf, dscore, dims):
    """stack: at the call; from_left, from_right: (padded size / BLOCK, wide, BLOCK), W by gates;
    dy: flat (B, T, 2 size); dstack: flat (B, D, 2 size), of the stack after at the call and before
    at the end; dscore: (groups, 4 size + 2). Zero at the call, flat: dmade (B, T, 2 size), of
    `made`, with that of the last stack's nodes in it already; dleft (B, T, wide) and dleft0
    (B, D, wide), of made's and stack's products as left children; dright, dnode (B, T, wide), of
    leaves' and nodes' as right ones; dleaf (B, T, 2 size)."""
    batch, length, slots, size, wide, groups = dims
    node = 2 * size
    padded = from_left.size // wide
    for group in numba.prange(groups):
        low, high = group * batch // groups, (group + 1) * batch // groups
        rows = high - low
        back, zeros = np.empty(rows * padded, np.float32), np.zeros(padded, np.float32)
        mine, none = np.empty(rows * node, np.float32), np.zeros(node, np.float32)
        used = np.zeros((rows, length), np.bool_)
        which = np.zeros(rows, np.int64)
        sources, targets = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        for past in range(length):
            t = length - 1 - past
            pairs = 0
            for r in range(rows):  # what was made here: all that reads it comes later
                step = (low + r) * length + t
                _add(dy, step * node, np.float32(1), dmade, step * node, size)
                link = links[low + r, t, 2]
                if link != NONE:
                    at = _where(link, low + r, length, slots) * node
                    _add(dy, step * node + size, np.float32(1), dmade if link >= 0 else dstack,
                         at, size)
                if used[r, t]:
                    sources[pairs], targets[pairs], which[pairs] = step * wide, r * padded, r
                    pairs += 1
            _products(from_left, zeros, wide, padded, dleft, sources, back, targets, pairs)
            for k in range(pairs):
                step = (low + which[k]) * length + t
                _add(back, targets[k], np.float32(1), dmade, step * node, size)

            pairs = 0
            for r in range(rows):  # the second decision
                row, step = low + r, (low + r) * length + t
                at, link, flags = step * node, links[low + r, t, 1], links[low + r, t, 3]
                g, below = (2 * step + 1) * wide, 0
                if link != NONE:
                    below = _where(link, row, length, slots) * node
                store_below = made if link >= 0 else stack
                grad_below = dmade if link >= 0 else dstack
                if flags & _REDUCED:
                    _copy(none, 0, mine, r * node, node)
                    _decompose(gates, g, store_below, below, nodes, at, dmade, at, dmade,
                               at + size, dnode, step * wide, grad_below, below, mine, r * node,
                               size)
                    if link >= 0:
                        _add(dnode, step * wide, np.float32(1), dleft,
                             below // node * wide, wide)
                        used[r, link] = True
                    else:
                        _add(dnode, step * wide, np.float32(1), dleft0,
                             below // node * wide, wide)
                else:
                    _copy(dmade, at, mine, r * node, node)
                if flags & _FREE_REDUCE:
                    p = chances[row, t, 1]
                    s = p * (np.float32(1) - p) * _gain(gates, g, store_below, below, nodes, at,
                                                        nodes, at, dmade, at, size)
                    _add(score, node, s, grad_below, below, size)
                    _add(score, node + size, s, mine, r * node, size)
                    _add(store_below, below, s, dscore[group], node, size)
                    _add(nodes, at, s, dscore[group], node + size, size)
                    dscore[group, 4 * size + 1] += s
                if flags & _REDUCED:
                    if flags & (_JOINED | _FREE_JOIN):
                        sources[pairs], targets[pairs], which[pairs] = step * wide, r * padded, r
                        pairs += 1
                    else:  # all of it is the leaf's, and part of the leaves' product
                        _copy(dnode, step * wide, dright, step * wide, wide)
                        for v in range(0, wide, WIDTH):
                            store(dnode, step * wide + v, splat(np.float32(0)))
            _products(from_right, zeros, wide, padded, dnode, sources, back, targets, pairs)
            for k in range(pairs):
                _add(back, targets[k], np.float32(1), mine, which[k] * node, size)

            for r in range(rows):  # the first decision
                row, step = low + r, (low + r) * length + t
                at, link, flags = step * node, links[low + r, t, 0], links[low + r, t, 3]
                g, top = 2 * step * wide, 0
                if link != NONE:
                    top = _where(link, row, length, slots) * node
                store_top = made if link >= 0 else stack
                grad_top = dmade if link >= 0 else dstack
                if flags & _JOINED:
                    _decompose(gates, g, store_top, top, leaf, at, mine, r * node, mine,
                               r * node + size, dright, step * wide, grad_top, top, dleaf, at,
                               size)
                    if link >= 0:
                        _add(dright, step * wide, np.float32(1), dleft, top // node * wide, wide)
                        used[r, link] = True
                    else:
                        _add(dright, step * wide, np.float32(1), dleft0, top // node * wide, wide)
                else:
                    _add(mine, r * node, np.float32(1), dleaf, at, node)
                if flags & _FREE_JOIN:
                    p = chances[row, t, 0]
                    s = p * (np.float32(1) - p) * _gain(gates, g, store_top, top, leaf, at,
                                                        leaf, at, mine, r * node, size)
                    _add(score, 0, s, grad_top, top, size)
                    _add(score, size, s, dleaf, at, size)
                    _add(store_top, top, s, dscore[group], 0, size)
                    _add(leaf, at, s, dscore[group], size, size)
                    dscore[group, 4 * size] += s
