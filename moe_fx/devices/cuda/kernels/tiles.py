"""How a grouped matmul is cut into tiles, and what a program of one has to find: its tile, its
expert's rows, its part of the expert's matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

__all__ = ["Tiles", "both", "matrix", "precision", "program_of", "tile_of"]


@dataclass(frozen=True)
class Tiles:
    """How a matmul is cut: rows, columns and depth of a tile, row tiles that share columns, warps,
    stages in flight. described: matrices are fetched by descriptors (TMA, from Hopper on), of
    `gate_up` those of experts only. gathered: the tokens are gathered beforehand, and fetched by
    descriptors too. joined: gate and up, of one table, are one product of twice the columns
    (Hopper's widest, which reads rows once for both); without descriptors only where their columns
    alternate. rest: what is left of an expert's rows, if
    it is no more than so many, has a tile of so many; 0: of as many as any."""

    rows: int
    columns: int
    depth: int
    group: int
    warps: int
    stages: int
    described: bool = False
    gathered: bool = False
    joined: bool = False
    rest: int = 0


@triton.jit
def tile_of(ends, at, E, BE: tl.constexpr, BM: tl.constexpr):
    """(expert, first row, end of the expert's rows) of row tile ``at``; expert >= E: there is
    none."""
    experts = tl.arange(0, BE)
    real = experts < E
    end = tl.load(ends + experts, mask=real, other=0)
    begin = tl.load(ends + experts - 1, mask=real & (experts > 0), other=0)
    tiles = tl.where(real, (end - begin + BM - 1) // BM, 0)
    upto = tl.cumsum(tiles, 0)
    expert = tl.sum((upto <= at).to(tl.int32), 0)
    its = experts == expert
    first = tl.sum(tl.where(its, upto - tiles, 0), 0)
    row = tl.sum(tl.where(its, begin, 0), 0) + (at - first) * BM
    return expert, row, tl.sum(tl.where(its, end, 0), 0)


@triton.jit
def program_of(N, BN: tl.constexpr, G: tl.constexpr):
    """(row tile, column tile): G row tiles go through all columns together."""
    at = tl.program_id(0)
    columns = tl.cdiv(N, BN)
    rows = tl.num_programs(0) // columns
    group = at // (G * columns)
    size = tl.minimum(rows - group * G, G)
    within = at % (G * columns)
    return group * G + within % size, within // size


@triton.jit
def matrix(
    w,
    expert,
    n,
    k,
    N,
    K,
    se,
    sn,
    sk,
    BN: tl.constexpr,
    BK: tl.constexpr,
    DESCRIBED: tl.constexpr,
    K_LAST: tl.constexpr,
    EVEN: tl.constexpr,
):
    """``[BK, BN]`` of the expert's matrix."""
    if DESCRIBED:
        if K_LAST:
            found = tl.trans(tl.reshape(w.load([expert, n, k]), (BN, BK)))
        else:
            found = tl.reshape(w.load([expert, k, n]), (BK, BN))
    else:
        columns = n + tl.arange(0, BN)
        depth = k + tl.arange(0, BK)
        at = w + expert.to(tl.int64) * se + depth[:, None] * sk + columns[None, :].to(tl.int64) * sn
        if EVEN:
            found = tl.load(at)
        else:
            found = tl.load(at, mask=(depth < K)[:, None] & (columns < N)[None, :], other=0.0)
    return found


@triton.jit
def both(
    w, expert, n, k, BN: tl.constexpr, BK: tl.constexpr, JOINED: tl.constexpr, K_LAST: tl.constexpr
):
    """``[BK, 2 * BN]`` of the expert's matrix, gate and up as they stand in the table."""
    if JOINED != "interleaved":
        found = tl.trans(tl.reshape(w.load([expert, 0, n, k]), (2 * BN, BK)))
    elif K_LAST:
        found = tl.trans(tl.reshape(w.load([expert, 2 * n, k]), (2 * BN, BK)))
    else:
        found = tl.reshape(w.load([expert, k, 2 * n]), (BK, 2 * BN))
    return found


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"
