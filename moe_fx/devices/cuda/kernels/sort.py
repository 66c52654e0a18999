"""Pairs sorted by expert without a comparison sort; nothing waits for the host.

Of few pairs in one launch: each looks at all others, and its place is how many come before it. Of
many in three, by counting: counts of each block of pairs and expert, their running sums over the
blocks, and the places. The order within an expert is that of the pairs, so the result is always
the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fx.devices.cuda.launch import call, empty, launch

__all__ = ["inverse", "sort_pairs"]

_FEW = 8192
"""Pairs up to which one launch is faster."""
_ASKED, _SEEN = 32, 256
"""Pairs that a program places, and looks at at once, of few; and so many of many:"""
_BLOCK = 128


@triton.jit
def _hits(ids, start, S, E, BE: tl.constexpr, B: tl.constexpr):
    at = start + tl.arange(0, B)
    expert = tl.load(ids + at, mask=at < S, other=-1).to(tl.int32)
    experts = tl.arange(0, BE)
    return at, (expert[:, None] == experts[None, :]) & (experts < E)[None, :]


@triton.jit
def _place(at, hits, before, order, row_map, S):
    """``before``: of each expert, the rows of those before it and of its pairs in blocks before."""
    within = tl.cumsum(hits.to(tl.int32), 0) - 1
    place = tl.sum(tl.where(hits, within + before[None, :], 0), 1)
    found = tl.sum(hits.to(tl.int32), 1) > 0
    tl.store(order + place, at, mask=found)
    tl.store(row_map + at, tl.where(found, place, -1), mask=at < S)


@triton.jit
def _rank(ids, order, row_map, ends, S, E, A: tl.constexpr, B: tl.constexpr):
    """The first programs place pairs, the others count each expert's and those before. Pair ``i``
    of expert ``e`` is ``e * S + i``, so that equal ones keep their order."""
    block = tl.program_id(0)
    placing = tl.cdiv(S, A)
    asked = block * A + tl.arange(0, A)
    if block < placing:
        expert = tl.load(ids + asked, mask=asked < S, other=-1).to(tl.int32)
        found = (expert >= 0) & (expert < E)
        key = expert * S + asked
    else:
        asked -= placing * A
        found = asked < E
        key = (asked + 1) * S
    before = tl.zeros((A,), tl.int32)
    for start in range(0, S, B):
        at = start + tl.arange(0, B)
        other = tl.load(ids + at, mask=at < S, other=-1).to(tl.int32)
        seen = (other >= 0) & (other < E)
        earlier = (other * S + at)[None, :] < key[:, None]
        before += tl.sum((seen[None, :] & earlier).to(tl.int32), 1)
    if block < placing:
        tl.store(order + before, asked, mask=found)
        tl.store(row_map + asked, tl.where(found, before, -1), mask=asked < S)
    else:
        tl.store(ends + asked, before, mask=found)


@triton.jit
def _count(ids, counts, S, E, NB, BE: tl.constexpr, B: tl.constexpr):
    block = tl.program_id(0)
    _, hits = _hits(ids, block * B, S, E, BE, B)
    experts = tl.arange(0, BE)
    tl.store(counts + experts * NB + block, tl.sum(hits.to(tl.int32), 0), mask=experts < E)


@triton.jit
def _run(counts, totals, NB, BNB: tl.constexpr):
    """One expert's counts of all blocks, to those of the blocks before."""
    expert = tl.program_id(0)
    blocks = tl.arange(0, BNB)
    count = tl.load(counts + expert * NB + blocks, mask=blocks < NB, other=0)
    upto = tl.cumsum(count, 0)
    tl.store(counts + expert * NB + blocks, upto - count, mask=blocks < NB)
    tl.store(totals + expert, tl.sum(count, 0))


@triton.jit
def _scatter(
    ids,
    counts,
    totals,
    order,
    row_map,
    ends,
    S,
    E,
    NB,
    BE: tl.constexpr,
    B: tl.constexpr,
):
    block = tl.program_id(0)
    experts = tl.arange(0, BE)
    total = tl.load(totals + experts, mask=experts < E, other=0)
    upto = tl.cumsum(total, 0)
    if block == 0:
        tl.store(ends + experts, upto, mask=experts < E)
    earlier = tl.load(counts + experts * NB + block, mask=experts < E, other=0)
    at, hits = _hits(ids, block * B, S, E, BE, B)
    _place(at, hits, upto - total + earlier, order, row_map, S)


def sort_pairs(ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """``ids [T, K]`` of any integer dtype to int32 ``order [S]`` (the pair at each place, sorted by
    expert), ``row_map [S]`` (the place of each pair, -1: its id is no expert's) and ``ends [E]``.
    Places behind the last expert's end are not written."""
    ids = ids.contiguous()
    pairs = ids.numel()
    order, row_map = (empty((pairs,), torch.int32, ids.device) for _ in range(2))
    ends = empty((experts,), torch.int32, ids.device)
    if pairs <= _FEW:
        grid = (triton.cdiv(pairs, _ASKED) + triton.cdiv(experts, _ASKED),)
        launch(_rank, grid, ids, order, row_map, ends, pairs, experts, _ASKED, _SEEN)
        return order, row_map, ends
    columns, block = max(16, triton.next_power_of_2(experts)), _BLOCK
    blocks = triton.cdiv(pairs, block)
    counts = empty((experts * blocks + experts,), torch.int32, ids.device)
    totals = counts[experts * blocks :]
    launch(_count, (blocks,), ids, counts, pairs, experts, blocks, columns, block)
    launch(_run, (experts,), counts, totals, blocks, triton.next_power_of_2(blocks))
    launch(
        _scatter,
        (blocks,),
        ids,
        counts,
        totals,
        order,
        row_map,
        ends,
        pairs,
        experts,
        blocks,
        columns,
        block,
    )
    return order, row_map, ends


@triton.jit
def _inverse(order, end, row_map, B: tl.constexpr):
    place = tl.program_id(0) * B + tl.arange(0, B)
    used = place < tl.load(end)
    pair = tl.load(order + place, mask=used, other=0)
    tl.store(row_map + pair, place, mask=used)


def inverse(order: Tensor, ends: Tensor) -> Tensor:
    """``row_map`` of `sort_pairs` again."""
    row_map = call(torch.full_like, order, -1)
    launch(_inverse, (triton.cdiv(len(order), 256),), order, ends[-1:], row_map, 256)
    return row_map
