"""Matmuls of rows sorted by expert, each with its expert's matrix, that gather what they read.

`gate_up` reads tokens by the pairs' order, so that no permuted copy is made, and ends with bias and
activation. `down` multiplies each row by its routing weight and writes it at its pair's place, so
that a token's rows stand together. A program has one tile of one expert's rows; which expert's
follows from where each expert's rows end, so the host need not know.

Learned from: Liger-Kernel `ops/fused_moe.py`, vLLM `fused_moe` (one tile map for all experts).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_fx.devices.cuda.kernels.activation import activated
from moe_fx.devices.cuda.kernels.rows import Places, gather
from moe_fx.devices.cuda.kernels.tiles import (
    Tiles,
    both,
    matrix,
    precision,
    program_of,
    tile_of,
)
from moe_fx.devices.cuda.launch import empty, launch

__all__ = ["down", "gate_up", "plain"]


@triton.jit
def _gate_up(
    x, x_rest, order, ends, gate, up, gate_bias, up_bias, out, columns_out,
    E, N, K, sx, se, sn, sk, sbe, sbn,
    GATHERS: tl.constexpr, FETCHES: tl.constexpr, TOP_K: tl.constexpr, BE: tl.constexpr,
    GATED: tl.constexpr, JOINED: tl.constexpr, BIASED: tl.constexpr, KEPT: tl.constexpr,
    STEP: tl.constexpr, OG: tl.constexpr, OU: tl.constexpr, SC: tl.constexpr,
    ACT: tl.constexpr, alpha: tl.constexpr, LIMITED: tl.constexpr, limit: tl.constexpr,
    shift: tl.constexpr, DESCRIBED: tl.constexpr, K_LAST: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, REST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = program_of(N, BN, G)
    expert, first, end = tile_of(ends, row_tile, E, BE, BM)
    if expert >= E:
        return
    if REST == 0:
        _gate_up_tile(
            x, order, gate, up, gate_bias, up_bias, out, columns_out,
            expert, first, end, column_tile * BN, N, K, sx, se, sn, sk, sbe, sbn,
            GATHERS, FETCHES, TOP_K, GATED, JOINED, BIASED, KEPT, STEP, OG, OU, SC,
            ACT, alpha, LIMITED, limit, shift, DESCRIBED, K_LAST, EVEN, PRECISION, BM, BN, BK,
        )  # fmt: skip
    else:  # apart: a condition that is known when it compiles leaves no branch
        if end - first <= REST:
            _gate_up_tile(
                x_rest, order, gate, up, gate_bias, up_bias, out, columns_out,
                expert, first, end, column_tile * BN, N, K, sx, se, sn, sk, sbe, sbn,
                GATHERS, FETCHES, TOP_K, GATED, JOINED, BIASED, KEPT, STEP, OG, OU, SC,
                ACT, alpha, LIMITED, limit, shift, DESCRIBED, K_LAST, EVEN, PRECISION, REST, BN, BK,
            )  # fmt: skip
        else:
            _gate_up_tile(
                x, order, gate, up, gate_bias, up_bias, out, columns_out,
                expert, first, end, column_tile * BN, N, K, sx, se, sn, sk, sbe, sbn,
                GATHERS, FETCHES, TOP_K, GATED, JOINED, BIASED, KEPT, STEP, OG, OU, SC,
                ACT, alpha, LIMITED, limit, shift, DESCRIBED, K_LAST, EVEN, PRECISION, BM, BN, BK,
            )  # fmt: skip


@triton.jit
def _gate_up_tile(
    x, order, gate, up, gate_bias, up_bias, out, columns_out,
    expert, first, end, n, N, K, sx, se, sn, sk, sbe, sbn,
    GATHERS: tl.constexpr, FETCHES: tl.constexpr, TOP_K: tl.constexpr,
    GATED: tl.constexpr, JOINED: tl.constexpr, BIASED: tl.constexpr, KEPT: tl.constexpr,
    STEP: tl.constexpr, OG: tl.constexpr, OU: tl.constexpr, SC: tl.constexpr,
    ACT: tl.constexpr, alpha: tl.constexpr, LIMITED: tl.constexpr, limit: tl.constexpr,
    shift: tl.constexpr, DESCRIBED: tl.constexpr, K_LAST: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = first + tl.arange(0, BM)
    real = rows < end
    if GATHERS:
        token = (tl.load(order + rows, mask=real, other=0) // TOP_K).to(tl.int64)
    else:
        token = rows.to(tl.int64)
    columns = n + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    g = tl.zeros((BM, BN if JOINED == "" else 2 * BN), tl.float32)
    u = g
    for k in range(0, K, BK):
        if FETCHES:
            a = x.load([first, k])
        else:
            at = x + token[:, None] * sx + (k + depth)[None, :]
            if EVEN:
                a = tl.load(at, mask=real[:, None], other=0.0)
            else:
                a = tl.load(at, mask=real[:, None] & (k + depth < K)[None, :], other=0.0)
        if JOINED == "":
            b = matrix(gate, expert, n, k, N, K, se, sn, sk, BN, BK, DESCRIBED, K_LAST, EVEN)
        elif DESCRIBED:
            b = both(gate, expert, n, k, BN, BK, JOINED, K_LAST)
        else:
            b = matrix(
                gate, expert, 2 * n, k, 2 * N, K, se, sn, sk, 2 * BN, BK, False, K_LAST, EVEN
            )  # fmt: skip
        g = tl.dot(a, b, g, input_precision=PRECISION)
        if GATED and JOINED == "":
            b = matrix(up, expert, n, k, N, K, se, sn, sk, BN, BK, DESCRIBED, K_LAST, EVEN)
            u = tl.dot(a, b, u, input_precision=PRECISION)
    if JOINED == "interleaved":
        g, u = tl.split(tl.reshape(g, (BM, BN, 2)))
    elif JOINED == "halves":
        g, u = tl.split(tl.permute(tl.reshape(g, (BM, 2, BN)), (0, 2, 1)))
    elif JOINED == "halves_up_first":
        u, g = tl.split(tl.permute(tl.reshape(g, (BM, 2, BN)), (0, 2, 1)))
    if BIASED:
        place = expert * sbe + columns * sbn
        g += tl.load(gate_bias + place, mask=columns < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            u += tl.load(up_bias + place, mask=columns < N, other=0.0).to(tl.float32)[None, :]
    kept = real[:, None] & (columns < N)[None, :]
    if KEPT:
        dtype = columns_out.dtype.element_ty
        at = columns_out + rows[:, None].to(tl.int64) * SC + columns[None, :] * STEP + OG
        tl.store(at, g.to(dtype), mask=kept)
        if GATED:
            at = columns_out + rows[:, None].to(tl.int64) * SC + columns[None, :] * STEP + OU
            tl.store(at, u.to(dtype), mask=kept)
    h = activated(g, u, GATED, ACT, alpha, LIMITED, limit, shift)
    tl.store(
        out + rows[:, None].to(tl.int64) * N + columns[None, :],
        h.to(out.dtype.element_ty),
        mask=kept,
    )


@triton.jit
def _down(
    h, h_rest, order, ends, weights, table, bias, out,
    E, N, K, se, sn, sk, sbe,
    BE: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, DESCRIBED: tl.constexpr,
    K_LAST: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, REST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    row_tile, column_tile = program_of(N, BN, G)
    expert, first, end = tile_of(ends, row_tile, E, BE, BM)
    if expert >= E:
        return
    if REST == 0:
        _down_tile(
            h, order, weights, table, bias, out,
            expert, first, end, column_tile * BN, N, K, se, sn, sk, sbe,
            WEIGHTED, BIASED, DESCRIBED, K_LAST, EVEN, PRECISION, BM, BN, BK,
        )  # fmt: skip
    else:
        if end - first <= REST:
            _down_tile(
                h_rest, order, weights, table, bias, out,
                expert, first, end, column_tile * BN, N, K, se, sn, sk, sbe,
                WEIGHTED, BIASED, DESCRIBED, K_LAST, EVEN, PRECISION, REST, BN, BK,
            )  # fmt: skip
        else:
            _down_tile(
                h, order, weights, table, bias, out,
                expert, first, end, column_tile * BN, N, K, se, sn, sk, sbe,
                WEIGHTED, BIASED, DESCRIBED, K_LAST, EVEN, PRECISION, BM, BN, BK,
            )  # fmt: skip


@triton.jit
def _down_tile(
    h, order, weights, table, bias, out, expert, first, end, n, N, K, se, sn, sk, sbe,
    WEIGHTED: tl.constexpr, BIASED: tl.constexpr, DESCRIBED: tl.constexpr, K_LAST: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    rows = first + tl.arange(0, BM)
    real = rows < end
    pair = tl.load(order + rows, mask=real, other=0)
    columns = n + tl.arange(0, BN)
    depth = tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        if DESCRIBED:
            a = h.load([first, k])
        else:
            at = h + rows[:, None].to(tl.int64) * K + k + depth[None, :]
            if EVEN:
                a = tl.load(at, mask=real[:, None], other=0.0)
            else:
                a = tl.load(at, mask=real[:, None] & (k + depth < K)[None, :], other=0.0)
        b = matrix(table, expert, n, k, N, K, se, sn, sk, BN, BK, DESCRIBED, K_LAST, EVEN)
        total = tl.dot(a, b, total, input_precision=PRECISION)
    if BIASED:
        added = tl.load(bias + expert * sbe + columns, mask=columns < N, other=0.0)
        total += added.to(tl.float32)[None, :]
    if WEIGHTED:
        weight = tl.load(weights + pair, mask=real, other=0.0).to(tl.float32)
        total = total * weight[:, None]
    at = out + pair[:, None].to(tl.int64) * N + columns[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=real[:, None] & (columns < N)[None, :])


def _described(table: Tensor, tiles: Tiles, k_last: bool) -> TensorDescriptor:
    """Of ``[E, K, N]``."""
    if k_last:
        table = table.transpose(1, 2)
    block = [1, tiles.columns, tiles.depth] if k_last else [1, tiles.depth, tiles.columns]
    return TensorDescriptor.from_tensor(table, block)


def _described_whole(table: Tensor, tiles: Tiles, layout: str) -> TensorDescriptor:
    """Of gate and up ``[E, K, 2 * I]``; halves have the summed dimension last."""
    columns = 2 * tiles.columns
    if layout == "interleaved":
        return _described(table, dataclasses.replace(tiles, columns=columns), table.stride(1) == 1)
    experts, depth, both = table.shape
    expert, _, step = table.stride()
    return TensorDescriptor(
        table.transpose(1, 2),
        [experts, 2, both // 2, depth],
        [expert, both // 2 * step, step, 1],
        [1, 2, tiles.columns, tiles.depth],
    )


def _fetched(rows: Tensor, tiles: Tiles) -> list[Any]:
    """Of ``[S, K]``, in tiles of either size. A tile may reach into the next expert's rows: what
    comes of those is not stored."""
    return [
        TensorDescriptor.from_tensor(rows, [size, tiles.depth]) if size else None
        for size in (tiles.rows, tiles.rest)
    ]


def _grid(pairs: int, experts: int, columns: int, tiles: Tiles) -> tuple[int]:
    row_tiles = triton.cdiv(pairs, tiles.rows) + min(experts, pairs)
    return (row_tiles * triton.cdiv(columns, tiles.columns),)


def _shared(tiles: Tiles, inner: int, outer: int, table: Tensor) -> dict[str, Any]:
    return {
        "DESCRIBED": tiles.described,
        "K_LAST": table.stride(1) == 1,
        "EVEN": inner % tiles.depth == 0 and outer % tiles.columns == 0,
        "PRECISION": precision(table.dtype),
        "REST": tiles.rest,
        "BM": tiles.rows,
        "BN": tiles.columns,
        "BK": tiles.depth,
        "G": tiles.group,
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def gate_up(
    tokens: Tensor,
    order: Tensor,
    ends: Tensor,
    gate: Tensor,
    up: Tensor | None,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    top_k: int,
    body: tuple[str, float, float | None, float],
    tiles: Tiles,
    places: Places,
    whole: Tensor,
    layout: str,
    columns: Tensor | None = None,
) -> Tensor:
    """``[S, I]`` activations of rows sorted by expert.

    gate, up: ``[E, H, I]`` of the same strides; biases ``[E, I]`` the same. whole: the table of
    which they are views, if there is one, of that layout. body: act, alpha, limit and shift.
    columns ``[S, N]``: gets what comes before the activation, where ``places`` says.
    """
    experts, depth, outer = gate.shape
    pairs = order.numel()
    out = empty((pairs, outer), tokens.dtype, tokens.device)
    shared = _shared(tiles, depth, outer, gate)
    second = gate if up is None else up
    tables: list[Any] = [gate, second]
    read_by = whole if tiles.joined else gate
    if tiles.joined:
        tables = [_described_whole(whole, tiles, layout) if tiles.described else whole, None]
    elif tiles.described:
        tables = [_described(each, tiles, shared["K_LAST"]) for each in tables]
    read: list[Any] = [tokens, tokens]
    if tiles.gathered:
        rows = gather(tokens, order, ends, top_k)
        read = _fetched(rows, tiles)
    act, alpha, limit, shift = body
    bias_strides = gate_bias.stride() if gate_bias is not None else (0, 0)
    launch(
        _gate_up, _grid(pairs, experts, outer, tiles),
        *read, order, ends, *tables, gate_bias, up_bias, out, columns,
        experts, outer, depth,
        tokens.stride(0), read_by.stride(0), read_by.stride(2), read_by.stride(1),
        *bias_strides,
        GATHERS=not tiles.gathered, FETCHES=tiles.gathered,
        TOP_K=top_k, BE=triton.next_power_of_2(experts), GATED=up is not None,
        JOINED=layout if tiles.joined else "", BIASED=gate_bias is not None,
        KEPT=columns is not None, STEP=places.step, OG=places.gate, OU=places.up,
        SC=columns.shape[1] if columns is not None else 0,
        ACT=act, alpha=alpha, LIMITED=limit is not None, limit=limit or 0.0, shift=shift, **shared,
    )  # fmt: skip
    return out


def down(
    h: Tensor,
    order: Tensor,
    ends: Tensor,
    weights: Tensor | None,
    table: Tensor,
    bias: Tensor | None,
    tiles: Tiles,
) -> Tensor:
    """``[S, H]``: pair ``i``'s result at row ``i``, times its weight. Rows of pairs that are no
    expert's are not written. table ``[E, I, H]``; bias ``[E, H]``."""
    experts, depth, outer = table.shape
    pairs = order.numel()
    out = empty((pairs, outer), h.dtype, h.device)
    shared = _shared(tiles, depth, outer, table)
    rows: list[Any] = [h, h]
    matrices: Any = table
    if tiles.described:
        rows = _fetched(h, tiles)
        matrices = _described(table, tiles, shared["K_LAST"])
    launch(
        _down, _grid(pairs, experts, outer, tiles),
        *rows, order, ends, weights, matrices, bias, out,
        experts, outer, depth, table.stride(0), table.stride(2), table.stride(1),
        bias.stride(0) if bias is not None else 0,
        BE=triton.next_power_of_2(experts), WEIGHTED=weights is not None, BIASED=bias is not None,
        **shared,
    )  # fmt: skip
    return out


def plain(rows: Tensor, table: Tensor, ends: Tensor, tiles: Tiles) -> Tensor:
    """``[S, N]``: rows sorted by expert times their expert's matrix of ``[E, K, N]``."""
    experts, depth, outer = table.shape
    out = empty((rows.shape[0], outer), rows.dtype, rows.device)
    shared = _shared(tiles, depth, outer, table)
    read: list[Any] = [rows, rows]
    fetched: Any = table
    if tiles.described:
        read, fetched = _fetched(rows, tiles), _described(table, tiles, shared["K_LAST"])
    launch(
        _gate_up, _grid(rows.shape[0], experts, outer, tiles),
        *read, ends, ends, fetched, None, None, None, out, None,
        experts, outer, depth, rows.stride(0), table.stride(0), table.stride(2), table.stride(1),
        0, 0, GATHERS=False, FETCHES=tiles.described, TOP_K=1, BE=triton.next_power_of_2(experts),
        GATED=False, JOINED="", BIASED=False, KEPT=False, STEP=1, OG=0, OU=0, SC=0,
        ACT="none", alpha=1.0, LIMITED=False, limit=0.0, shift=0.0, **shared,
    )  # fmt: skip
    return out
