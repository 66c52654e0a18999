"""Cuts: what each rank receives, cut at run time into pieces of about as many rows, whatever the
routing.

Rows stand sorted by expert. A cut falls between two experts where one ends near; else it goes
through an expert, the same share of whose rows each source then sends before it. So an expert that
most tokens select is spread over pieces, and one that few select is not torn.

The first and the last piece are halves (`shares`): nothing hides the way there of the first, nor
the way back of the last.

Few rows (of a step that decodes a token) are not worth many messages: they are cut into fewer
pieces, or none, and of the others no rank sends or receives anything: their sizes are `NOBODY`.

Shapes: ``W`` ranks, ``E`` experts, ``L = E / W`` local ones, ``N`` chunks, ``C`` pieces.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from moe_fx.ops._define import define
from moe_fx.ops.exchange import NOBODY


def shares(chunks: int) -> list[int]:
    """Of each piece, in parts of ``2 * chunks``: whole chunks, and the outer ones in halves."""
    if chunks == 1:
        return [2]
    return [1, 1, *[2] * (chunks - 2), 1, 1]


def _cut_rows(counts: Tensor, rank: int, chunks: int, least: int) -> tuple[Tensor, Tensor, Tensor]:
    """``counts [W, E]`` of all ranks to what the host needs: ``sizes [C, 2, W]``, rows of each
    piece sent to and received from each rank, and ``received [C, W, L]``, of each piece, source and
    local expert; and what the device needs: ``of_experts [C, L]``, rows of each piece and local
    expert. The one op that waits for the device.

    least: no expert is cut into less than so many rows. The rank that receives most gets chunks of
    twice as many, or there are fewer.
    """
    host = counts.cpu()
    world = host.shape[0]
    by_owner = host.view(world, world, -1)  # source, owner, local expert
    busiest = int(by_owner.sum((0, 2)).max())
    chunks_used = max(1, min(chunks, busiest // (2 * least)))
    upto = by_owner.cumsum(2)
    cuts = _cuts(by_owner.sum(0), by_owner, upto, chunks_used, least)
    unused = len(shares(chunks)) - len(shares(chunks_used))
    cuts = torch.cat([cuts, cuts[..., -1:].expand(-1, -1, unused)], 2)
    pieces = cuts.diff(dim=2)  # source, owner, piece
    sizes = torch.stack([pieces[rank].t(), pieces[:, rank].t()], 1).contiguous()
    sizes[len(sizes) - unused :] = NOBODY
    begins, ends = (cuts[:, rank, part].t().unsqueeze(2) for part in (slice(-1), slice(1, None)))
    own = upto[:, rank]
    overlap = torch.minimum(ends, own) - torch.maximum(begins, own - by_owner[:, rank])
    received = overlap.clamp_(min=0).contiguous()
    return sizes, received, received.sum(1).to(counts.device)


def _cuts(totals: Tensor, by_owner: Tensor, upto: Tensor, chunks: int, least: int) -> Tensor:
    """``[W, W, C + 1]``: of the rows from a source to an owner, how many are before each cut."""
    ends = totals.cumsum(1)
    rows = ends[:, -1:]
    parts = list(itertools.accumulate(shares(chunks)))[:-1]
    wanted = rows * torch.tensor(parts, dtype=torch.int64) // (2 * chunks)
    slack = (rows // (4 * chunks)).clamp(min=least)
    expert = torch.searchsorted(ends, wanted, right=True).clamp_(max=totals.shape[1] - 1)
    of_expert = totals.gather(1, expert)
    before = wanted - (ends - totals).gather(1, expert)
    behind = of_expert - before
    torn = torch.minimum(before, behind) >= slack
    before = torch.where(torn, before, torch.where(before <= behind, 0, of_expert))
    expert = expert.expand(len(totals), *expert.shape)
    rows_of_expert = by_owner.gather(2, expert)
    inner = upto.gather(2, expert) - rows_of_expert
    inner += rows_of_expert * before // of_expert.clamp(min=1)
    return torch.cat([torch.zeros_like(upto[..., :1]), inner, upto[..., -1:]], 2)


def _cut_rows_fake(
    counts: Tensor, rank: int, chunks: int, least: int
) -> tuple[Tensor, Tensor, Tensor]:
    world, pieces = counts.shape[0], len(shares(chunks))
    local = counts.shape[1] // world
    sizes, received = (
        torch.empty((pieces, *each), dtype=torch.int64, device="cpu")
        for each in ((2, world), (world, local))
    )
    return sizes, received, counts.new_empty((pieces, local))


define(
    "cut_rows(Tensor counts, int rank, int chunks, int least) -> "
    "(Tensor sizes, Tensor received, Tensor of_experts)",
    _cut_rows,
    _cut_rows_fake,
)
