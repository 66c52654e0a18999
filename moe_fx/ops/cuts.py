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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moe_fx.ops._define import define
from moe_fx.ops.exchange import NOBODY

Counts = npt.NDArray[np.int64]


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
    world = counts.shape[0]
    by_owner = counts.cpu().numpy().astype(np.int64).reshape(world, world, -1)
    busiest = int(by_owner.sum((0, 2)).max())
    chunks_used = max(1, min(chunks, busiest // (2 * least)))
    upto = by_owner.cumsum(2)
    cuts = _cuts(by_owner, upto, chunks_used, least)
    unused = len(shares(chunks)) - len(shares(chunks_used))
    cuts = np.concatenate([cuts, np.repeat(cuts[..., -1:], unused, 2)], 2)
    pieces = np.diff(cuts, axis=2)  # source, owner, piece
    sizes = np.stack([pieces[rank].T, pieces[:, rank].T], 1)
    sizes[len(sizes) - unused :] = NOBODY
    begins, ends = (cuts[:, rank, part].T[:, :, None] for part in (slice(-1), slice(1, None)))
    own = upto[:, rank]
    overlap = np.minimum(ends, own) - np.maximum(begins, own - by_owner[:, rank])
    received = _tensor(np.maximum(overlap, 0))
    return _tensor(sizes), received, received.sum(1).to(counts.device)


def _tensor(counts: Counts) -> Tensor:
    """Of strides as the fake kernel says: NumPy keeps those of transposed operands."""
    return torch.from_numpy(np.ascontiguousarray(counts))


def _cuts(by_owner: Counts, upto: Counts, chunks: int, least: int) -> Counts:
    """``[W, W, C + 1]``: of the rows from a source to an owner, how many are before each cut. In
    NumPy: dozens of small steps."""
    totals = by_owner.sum(0)
    ends = totals.cumsum(1)
    rows = ends[:, -1:]
    parts = np.array(list(itertools.accumulate(shares(chunks)))[:-1], dtype=np.int64)
    wanted = rows * parts // (2 * chunks)
    slack = np.maximum(rows // (4 * chunks), least)
    found = (ends[:, None, :] <= wanted[:, :, None]).sum(2)
    expert = np.minimum(found, totals.shape[1] - 1)
    of_expert = np.take_along_axis(totals, expert, 1)
    before = wanted - np.take_along_axis(ends - totals, expert, 1)
    behind = of_expert - before
    torn = np.minimum(before, behind) >= slack
    before = np.where(torn, before, np.where(before <= behind, 0, of_expert))
    expert = np.broadcast_to(expert, (len(totals), *expert.shape))
    rows_of_expert = np.take_along_axis(by_owner, expert, 2)
    inner = np.take_along_axis(upto, expert, 2) - rows_of_expert
    inner = inner + rows_of_expert * before // np.maximum(of_expert, 1)
    return np.concatenate([np.zeros_like(upto[..., :1]), inner, upto[..., -1:]], 2)


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
