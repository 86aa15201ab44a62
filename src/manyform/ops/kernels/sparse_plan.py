"""Which 32 queries meet which keys at once, from the intervals of keys that each query sees.

A block of 64 keys is met by the queries that see one of them. Where enough of 32 neighbours do,
they meet it side by side (`near`); the others are gathered, 32 at a time, wherever they stand
(`far`). A meeting has four numbers, (tile, first, end, masked): the tile of 32 neighbours, or of
gathered queries how many there are; the keys, one or both halves of the block; and whether some
query does not see all of these. Of each query it has the keys that it sees, from `low` to `high`
counted from `first`. No query is twice in a meeting.
"""

from __future__ import annotations

import numba
import numpy as np

SIDE = 32
"""Queries a meeting."""
KEYS = 64
"""Keys a block."""
ENOUGH = 14
"""Queries of 32 neighbours from which on it is cheaper to compute for all of them."""


@numba.njit(cache=True)
def measure(low, high, starts):
    """Where the visits to each block begin in one long list; low, high: (patterns, n, intervals).

    A visit is a query and an interval. starts (patterns, blocks + 1) gets the first visit of each
    block; returns how many there are.
    """
    patterns, n, intervals = low.shape
    blocks = starts.shape[1] - 1
    place = 0
    for p in range(patterns):
        starts[p] = 0
        for i in range(n):
            for m in range(intervals):
                if low[p, i, m] < high[p, i, m]:
                    starts[p, low[p, i, m] // KEYS] += 1
                    starts[p, (high[p, i, m] - 1) // KEYS + 1] -= 1
        visiting = 0
        for block in range(blocks + 1):
            visiting += starts[p, block]
            starts[p, block] = place
            place += visiting
    return place


@numba.njit(cache=True)
def visit(low, high, starts, rows, edges):
    """The visits to each block: queries in rising order, and the keys (first | end << 8)."""
    patterns, n, intervals = low.shape
    for p in range(patterns):
        ends = starts[p].copy()
        for i in range(n):
            for m in range(intervals):
                a, b = low[p, i, m], high[p, i, m]
                if a < b:
                    for block in range(a // KEYS, (b - 1) // KEYS + 1):
                        rows[ends[block]] = i
                        first, end = max(a - block * KEYS, 0), min(b - block * KEYS, KEYS)
                        edges[ends[block]] = first | end << 8
                        ends[block] += 1


@numba.njit(cache=True)
def _close(info, low, high, block, tile):
    """A meeting whose queries are known: which halves of its block it needs."""
    first, end = KEYS, 0
    for r in range(SIDE):
        if low[r] < high[r]:
            first, end = min(first, int(low[r])), max(end, int(high[r]))
    first, end = first // SIDE * SIDE, (end + SIDE - 1) // SIDE * SIDE
    masked = 0
    for r in range(SIDE):
        low[r] -= first
        high[r] -= first
        if low[r] > 0 or high[r] < end - first:
            masked = 1
    info[0], info[1], info[2], info[3] = tile, block * KEYS + first, block * KEYS + end, masked


@numba.njit(cache=True)
def arrange(starts, rows, edges, near_starts, near, near_low, near_high, far_starts, far, far_rows,
            far_low, far_high, fill):
    """The meetings of each block, counted if not `fill`, else written; low and high: (., 32).

    near_starts, far_starts (patterns, blocks + 1): the first meeting of each block.
    """
    n_near, n_far = 0, 0
    for p in range(starts.shape[0]):
        for block in range(starts.shape[1] - 1):
            near_starts[p, block], far_starts[p, block] = n_near, n_far
            e, end, open_, last = starts[p, block], starts[p, block + 1], 0, -1
            while e < end:
                tile, stop, different, row = rows[e] // SIDE, e, 0, -1
                while stop < end and rows[stop] // SIDE == tile:
                    different += rows[stop] != row
                    row = rows[stop]
                    stop += 1
                row, side_by_side = -1, different >= ENOUGH
                if side_by_side and fill:
                    near_low[n_near] = 0
                    near_high[n_near] = 0
                for i in range(e, stop):
                    if side_by_side and rows[i] != row:
                        row = rows[i]
                        if fill:
                            near_low[n_near, row % SIDE] = edges[i] & 255
                            near_high[n_near, row % SIDE] = edges[i] >> 8
                        continue
                    if open_ == SIDE or (open_ > 0 and rows[i] == last):
                        if fill:
                            _close(far[n_far], far_low[n_far], far_high[n_far], block, open_)
                        n_far, open_ = n_far + 1, 0
                    if fill:
                        if open_ == 0:
                            far_low[n_far] = 0
                            far_high[n_far] = 0
                        far_rows[n_far, open_] = rows[i]
                        far_low[n_far, open_] = edges[i] & 255
                        far_high[n_far, open_] = edges[i] >> 8
                    last, open_ = rows[i], open_ + 1
                if side_by_side:
                    if fill:
                        _close(near[n_near], near_low[n_near], near_high[n_near], block, tile)
                    n_near += 1
                e = stop
            if open_ > 0:
                if fill:
                    _close(far[n_far], far_low[n_far], far_high[n_far], block, open_)
                n_far += 1
        near_starts[p, -1], far_starts[p, -1] = n_near, n_far
    return n_near, n_far


@numba.njit(cache=True)
def by_tile(near_starts, near, tile_starts, order):
    """The near meetings of each tile of queries, in rising order of keys.

    tile_starts (patterns, tiles + 1); order: which meeting comes next.
    """
    for p in range(near_starts.shape[0]):
        first, end = near_starts[p, 0], near_starts[p, -1]
        tile_starts[p] = 0
        for e in range(first, end):
            tile_starts[p, near[e, 0]] += 1
        place = first
        for tile in range(tile_starts.shape[1]):
            count = tile_starts[p, tile]
            tile_starts[p, tile] = place
            place += count
        to = tile_starts[p].copy()
        for e in range(first, end):
            order[to[near[e, 0]]] = e
            to[near[e, 0]] += 1


def plan(low, high, keys):
    """All meetings, for the loops of `sparse_attention`: near_starts, near, near_low, near_high,
    tile_starts, order, far_starts, far, far_rows, far_low, far_high. low, high: (patterns, n,
    intervals) int64 arrays."""
    patterns, n, _ = low.shape
    blocks, tiles = -(-keys // KEYS), -(-n // SIDE)
    starts, near_starts, far_starts = (np.empty((patterns, blocks + 1), np.int64)
                                       for _ in range(3))
    visits = measure(low, high, starts)
    rows, edges = np.empty(visits, np.int32), np.empty(visits, np.int32)
    visit(low, high, starts, rows, edges)

    def room(count, *rest):
        return (np.empty((count, 4), np.int32), *rest, np.empty((count, SIDE), np.float32),
                np.empty((count, SIDE), np.float32))
    counts = arrange(starts, rows, edges, near_starts, *room(0), far_starts,
                     *room(0, np.empty((0, SIDE), np.int32)), False)
    near = room(counts[0])
    far = room(counts[1], np.empty((counts[1], SIDE), np.int32))
    arrange(starts, rows, edges, near_starts, *near, far_starts, *far, True)
    tile_starts, order = np.empty((patterns, tiles + 1), np.int64), np.empty(counts[0], np.int32)
    by_tile(near_starts, near[0], tile_starts, order)
    return near_starts, *near, tile_starts, order, far_starts, *far
