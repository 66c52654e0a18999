"""What is no matmul, on rows sorted by expert: gather, activation and its slope, weighted sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_fx.devices.cuda.kernels.activation import activated, sloped
from moe_fx.devices.cuda.launch import call, empty, launch

__all__ = ["Places", "activate", "add_bias_products", "bias_sums", "gather", "slope", "total"]


@dataclass(frozen=True)
class Places:
    """Where a row's columns stand: ``i`` of the gate at ``gate + i * step``, of up at
    ``up + i * step``, of ``width`` each."""

    width: int
    step: int
    gate: int
    up: int
    gated: bool

    @classmethod
    def of(cls, layout: str, width: int) -> Places:
        """Of a layout of `moe_fx.ops.fused`; "separate" is as "halves" here."""
        if layout == "interleaved":
            return cls(width, 2, 0, 1, gated=True)
        if layout == "halves_up_first":
            return cls(width, 1, width, 0, gated=True)
        return cls(width, 1, 0, width, gated=layout != "single")


_WIDTH = 1024


@triton.jit
def _gather(
    x,
    order,
    end,
    weights,
    out,
    N,
    sx,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    B: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(end):
        return
    pair = tl.load(order + row)
    token = pair.to(tl.int64) // TOP_K
    columns = tl.program_id(1) * B + tl.arange(0, B)
    value = tl.load(x + token * sx + columns, mask=columns < N, other=0.0)
    if WEIGHTED:
        value = (value.to(tl.float32) * tl.load(weights + pair).to(tl.float32)).to(value.dtype)
    tl.store(out + row * N + columns, value, mask=columns < N)


@triton.jit
def _activate(
    columns, ends, gate_bias, up_bias, out, E, N,
    SG: tl.constexpr, OG: tl.constexpr, OU: tl.constexpr, SC: tl.constexpr, BIASED: tl.constexpr,
    sbe, sbn, GATED: tl.constexpr, ACT: tl.constexpr, alpha: tl.constexpr,
    LIMITED: tl.constexpr, limit: tl.constexpr, shift: tl.constexpr,
    BE: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    n = tl.program_id(1) * B + tl.arange(0, B)
    real = n < N
    at = columns + row.to(tl.int64) * SC + n * SG
    dtype = out.dtype.element_ty
    g = tl.load(at + OG, mask=real, other=0.0).to(tl.float32)
    u = g
    if GATED:
        u = tl.load(at + OU, mask=real, other=0.0).to(tl.float32)
    if BIASED:
        experts = tl.arange(0, BE)
        end = tl.load(ends + experts, mask=experts < E, other=0)
        expert = tl.sum(((end <= row) & (experts < E)).to(tl.int32), 0)
        found = n < tl.where(expert < E, N, 0)
        place = expert * sbe + n * sbn
        g += tl.load(gate_bias + place, mask=found, other=0.0).to(tl.float32)
        tl.store(at + OG, g.to(dtype), mask=real)
        if GATED:
            u += tl.load(up_bias + place, mask=found, other=0.0).to(tl.float32)
            tl.store(at + OU, u.to(dtype), mask=real)
    h = activated(g, u, GATED, ACT, alpha, LIMITED, limit, shift)
    tl.store(out + row.to(tl.int64) * N + n, h.to(dtype), mask=real)


@triton.jit
def _slope(
    columns, back, order, end, weights, activations, grad_columns, products, N,
    SG: tl.constexpr, OG: tl.constexpr, OU: tl.constexpr, SC: tl.constexpr,
    WEIGHTED: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr, alpha: tl.constexpr,
    LIMITED: tl.constexpr, limit: tl.constexpr, shift: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if row >= tl.load(end):
        return
    pair = tl.load(order + row)
    dtype = activations.dtype.element_ty
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(weights + pair).to(tl.float32)
    product = tl.zeros((B,), tl.float32)
    for start in range(0, N, B):
        n = start + tl.arange(0, B)
        real = n < N
        at = row * SC + n * SG
        g = tl.load(columns + at + OG, mask=real, other=0.0).to(tl.float32)
        u = g
        if GATED:
            u = tl.load(columns + at + OU, mask=real, other=0.0).to(tl.float32)
        grad = tl.load(back + row * N + n, mask=real, other=0.0).to(tl.float32)
        h, grad_g, grad_u = sloped(g, u, grad * weight, GATED, ACT, alpha, LIMITED, limit, shift)
        product += tl.where(real, h * grad, 0.0)
        tl.store(activations + row * N + n, (h * weight).to(dtype), mask=real)
        tl.store(grad_columns + at + OG, grad_g.to(dtype), mask=real)
        if GATED:
            tl.store(grad_columns + at + OU, grad_u.to(dtype), mask=real)
    if WEIGHTED:
        tl.store(products + pair, tl.sum(product, 0))


@triton.jit
def _total(
    rows, row_map, weights, bias, ids, out, N,
    K: tl.constexpr, MAPPED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr,
    sb, B: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * B + tl.arange(0, B)
    real = n < N
    acc = tl.zeros((B,), tl.float32)
    for k in tl.static_range(K):
        pair = token * K + k
        place = tl.load(row_map + pair).to(tl.int64)
        found = place >= 0
        if not MAPPED:
            place = pair
        kept = n < tl.where(found, N, 0)
        row = tl.load(rows + place * N + n, mask=kept, other=0.0).to(tl.float32)
        if BIASED:
            expert = tl.load(ids + pair)
            row += tl.load(bias + expert * sb + n, mask=kept, other=0.0).to(tl.float32)
        if WEIGHTED:
            row = row * tl.load(weights + pair).to(tl.float32)
        acc += tl.where(found, row, 0.0)
    tl.store(out + token * N + n, acc.to(out.dtype.element_ty), mask=real)


@triton.jit
def _bias_sums(
    rows, order, ends, weights, out, N, sr, WEIGHTED: tl.constexpr, R: tl.constexpr, B: tl.constexpr
):
    expert = tl.program_id(0)
    n = tl.program_id(1) * B + tl.arange(0, B)
    end = tl.load(ends + expert)
    begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    acc = tl.zeros((B,), tl.float32)
    for start in range(begin, end, R):
        row = start + tl.arange(0, R)
        real = (row < end)[:, None] & (n < N)[None, :]
        at = rows + row[:, None].to(tl.int64) * sr + n[None, :]
        value = tl.load(at, mask=real, other=0.0).to(tl.float32)
        if WEIGHTED:
            pair = tl.load(order + row, mask=row < end, other=0)
            value *= tl.load(weights + pair, mask=row < end, other=0.0).to(tl.float32)[:, None]
        acc += tl.sum(value, 0)
    tl.store(out + expert * N + n, acc, mask=n < N)


@triton.jit
def _add_bias_products(grads, order, ends, bias, products, E, N, BE: tl.constexpr, B: tl.constexpr):
    row = tl.program_id(0)
    experts = tl.arange(0, BE)
    end = tl.load(ends + experts, mask=experts < E, other=0)
    expert = tl.sum(((end <= row) & (experts < E)).to(tl.int32), 0)
    if expert >= E:
        return
    acc = tl.zeros((B,), tl.float32)
    for start in range(0, N, B):
        n = start + tl.arange(0, B)
        grad = tl.load(grads + row.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)
        acc += grad * tl.load(bias + expert * N + n, mask=n < N, other=0.0).to(tl.float32)
    pair = tl.load(order + row)
    tl.store(products + pair, tl.load(products + pair) + tl.sum(acc, 0))


def _block(width: int) -> int:
    return min(_WIDTH, max(16, triton.next_power_of_2(width)))


def gather(
    tokens: Tensor, order: Tensor, ends: Tensor, top_k: int, weights: Tensor | None = None
) -> Tensor:
    """``[S, H]``: each place's token, times its pair's weight if there are any. Places behind the
    last expert's end are not written."""
    pairs, width = order.numel(), tokens.shape[1]
    out = empty((pairs, width), tokens.dtype, tokens.device)
    block = _block(width)
    launch(
        _gather, (pairs, triton.cdiv(width, block)),
        tokens, order, ends[-1:], weights, out, width, tokens.stride(0), top_k,
        weights is not None, block,
    )  # fmt: skip
    return out


def activate(
    columns: Tensor,
    ends: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    body: tuple[str, float, float | None, float],
    places: Places,
) -> Tensor:
    """``[S, N] -> [S, I]``. Biases ``[E, I]`` of the same strides are added to ``columns`` first,
    in place."""
    out = empty((columns.shape[0], places.width), columns.dtype, columns.device)
    act, alpha, limit, shift = body
    block = _block(places.width)
    strides = gate_bias.stride() if gate_bias is not None else (0, 0)
    launch(
        _activate, (columns.shape[0], triton.cdiv(places.width, block)),
        columns, ends, gate_bias, up_bias, out, len(ends), places.width,
        places.step, places.gate, places.up, columns.shape[1], gate_bias is not None, *strides,
        places.gated, act, alpha, limit is not None, limit or 0.0, shift,
        triton.next_power_of_2(len(ends)), block,
    )  # fmt: skip
    return out


def slope(
    columns: Tensor,
    back: Tensor,
    order: Tensor,
    ends: Tensor,
    weights: Tensor | None,
    body: tuple[str, float, float | None, float],
    places: Places,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """For ``back [S, I]``, the gradient of the activations ``h`` without the routing weights:
    ``h * weight``, the gradient of ``columns [S, N]``, and of each pair's weight what comes of
    ``h`` (0 of pairs that are no expert's)."""
    pairs = order.numel()
    activations = empty(back.shape, back.dtype, back.device)
    grad_columns = empty(columns.shape, columns.dtype, columns.device)
    products = None
    if weights is not None:
        products = call(torch.zeros, pairs, dtype=torch.float32, device=back.device)
    act, alpha, limit, shift = body
    launch(
        _slope, (pairs,),
        columns, back, order, ends[-1:], weights, activations, grad_columns, products, places.width,
        places.step, places.gate, places.up, columns.shape[1], weights is not None, places.gated,
        act, alpha, limit is not None, limit or 0.0, shift, _block(places.width),
    )  # fmt: skip
    return activations, grad_columns, products


def total(
    rows: Tensor,
    row_map: Tensor,
    top_k: int,
    dtype: torch.dtype,
    mapped: bool,
    weights: Tensor | None = None,
    ids: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """``[T, H]``: each token's rows, with their expert's bias ``[E, H]`` and times their weights if
    there are any, summed in float32 in the order of its pairs. row_map: -1 for pairs without a
    row. mapped: ``rows`` are sorted by expert, as ``row_map`` says; else they stand by pair."""
    pairs, width = row_map.numel(), rows.shape[1]
    out = empty((pairs // top_k, width), dtype, rows.device)
    block = _block(width)
    launch(
        _total, (pairs // top_k, triton.cdiv(width, block)),
        rows, row_map, weights, bias, ids, out, width,
        top_k, mapped, weights is not None, bias is not None,
        bias.stride(0) if bias is not None else 0, block,
    )  # fmt: skip
    return out


def bias_sums(rows: Tensor, order: Tensor, ends: Tensor, weights: Tensor | None = None) -> Tensor:
    """``[E, N]`` in float32: the sum of each expert's rows, times their pairs' weights if there are
    any."""
    experts, width = len(ends), rows.shape[1]
    out = empty((experts, width), torch.float32, rows.device)
    block = min(128, _block(width))
    launch(
        _bias_sums,
        (experts, triton.cdiv(width, block)),
        rows,
        order,
        ends,
        weights,
        out,
        width,
        rows.stride(0),
        weights is not None,
        32,
        block,
    )
    return out


def add_bias_products(
    grads: Tensor, order: Tensor, ends: Tensor, bias: Tensor, products: Tensor
) -> None:
    """``products[pair] += grads[its row] @ bias[its expert]``."""
    experts, width = bias.shape
    columns = triton.next_power_of_2(experts)
    launch(
        _add_bias_products,
        (len(order),),
        grads,
        order,
        ends,
        bias,
        products,
        experts,
        width,
        columns,
        _block(width),
    )
