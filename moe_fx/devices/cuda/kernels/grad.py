"""The gradient of a table: each expert's rows, transposed, times what they were multiplied to.

A program has one tile of one expert's matrix and goes through that expert's rows. Whole tiles of
rows are fetched by descriptors, the last, in which the next expert's rows begin, with a mask.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_fx.devices.cuda.kernels.tiles import Tiles, precision
from moe_fx.devices.cuda.launch import empty, launch

__all__ = ["grad_table"]


@triton.jit
def _rows(x, row, end, n, N, sx, B: tl.constexpr, BK: tl.constexpr):
    """``[BK, B]``, 0 from the end on."""
    rows = row + tl.arange(0, BK)
    columns = n + tl.arange(0, B)
    at = x + rows[:, None].to(tl.int64) * sx + columns[None, :]
    return tl.load(at, mask=(rows < end)[:, None] & (columns < N)[None, :], other=0.0)


@triton.jit
def _grad_table(
    left, right, ends, out, fetched_left, fetched_right, K, N, sl, sr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(1)
    at = tl.program_id(0)
    columns = tl.cdiv(N, BN)
    rows = tl.cdiv(K, BM)
    group = at // (G * columns)
    size = tl.minimum(rows - group * G, G)
    within = at % (G * columns)
    k = (group * G + within % size) * BM
    n = within // size * BN
    end = tl.load(ends + expert)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    acc = tl.zeros((BM, BN), tl.float32)
    if DESCRIBED:
        whole = begin + (end - begin) // BK * BK
        for row in range(begin, whole, BK):
            a = fetched_left.load([row, k])
            b = fetched_right.load([row, n])
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        if whole < end:
            a = _rows(left, whole, end, k, K, sl, BM, BK)
            b = _rows(right, whole, end, n, N, sr, BN, BK)
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        out.store([expert, k, n], tl.reshape(acc.to(out.dtype), (1, BM, BN)))
    else:
        for row in range(begin, end, BK):
            a = _rows(left, row, end, k, K, sl, BM, BK)
            b = _rows(right, row, end, n, N, sr, BN, BK)
            acc = tl.dot(tl.trans(a), b, acc, input_precision=PRECISION)
        m = k + tl.arange(0, BM)
        o = n + tl.arange(0, BN)
        at = out + expert.to(tl.int64) * K * N + m[:, None].to(tl.int64) * N + o[None, :]
        tl.store(at, acc.to(out.dtype.element_ty), mask=(m < K)[:, None] & (o < N)[None, :])


def grad_table(left: Tensor, right: Tensor, ends: Tensor, tiles: Tiles) -> Tensor:
    """``[E, K, N]``: each expert's rows of ``left [S, K]``, transposed, times those of ``right
    [S, N]``. tiles: rows and columns of the result, depth of rows that are summed."""
    experts, depth, outer = len(ends), left.shape[1], right.shape[1]
    out = empty((experts, depth, outer), left.dtype, left.device)
    grid = (triton.cdiv(depth, tiles.rows) * triton.cdiv(outer, tiles.columns), experts)
    written: Any = out
    fetched: list[Any] = [None, None]
    if tiles.described:
        described = TensorDescriptor.from_tensor
        written = described(out, [1, tiles.rows, tiles.columns])
        fetched = [
            described(left, [tiles.depth, tiles.rows]),
            described(right, [tiles.depth, tiles.columns]),
        ]
    launch(
        _grad_table, grid,
        left, right, ends, written, *fetched, depth, outer, left.stride(0), right.stride(0),
        DESCRIBED=tiles.described, PRECISION=precision(left.dtype),
        BM=tiles.rows, BN=tiles.columns, BK=tiles.depth, G=tiles.group,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return out
