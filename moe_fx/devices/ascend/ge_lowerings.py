"""What each dialect op becomes in a GE graph, for torchair.

GE graphs hold only ops that torchair has a converter for. It has none for ``npu_moe_token_permute``
and its inverse, nor for what would tell the host a size, so here

| dialect | GE graph |
|---|---|
| permute, regroup, permute_local | npu_moe_init_routing_v2 |
| unpermute | npu_moe_finalize_routing |
| all_to_all, wait | HcomAllToAll(V) on the stream of exchanges (`ge.py`) |
| exchange_counts | npu_define::all_to_all_single_npu |
| expert_counts, split_sizes, arrived_experts, row_experts, rank_slices | ATen |

and what `lowerings.py` has for grouped matmuls, SwiGLU, gating and MC2. GE orders streams by the
edges of its graph, so no events are needed.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moe_fx.devices.ascend import mc2
from moe_fx.devices.ascend.emit import Emit, Unmet, value_of
from moe_fx.devices.ascend.lowerings import (
    Lowered,
    Lowering,
    arguments,
    experts_per_token,
    gating_top_k,
    grouped_mm,
    grouped_mm_list,
    permute_local,
    routed,
    with_empty_row,
)
from moe_fx.devices.ascend.streams import even_exchange
from moe_fx.ops.routing import gating_top_k as route

aten = torch.ops.aten
ops = torch.ops.moe_fx

_EXPERTS = "moe_fx_experts"
_TOKEN_MAJOR = 2
"""``drop_pad_mode`` for rows of npu_moe_init_routing_v2."""


def permute(emit: Emit, node: Node) -> Lowered:
    tokens, ids, num_out_tokens = arguments(node)
    if num_out_tokens is not None:
        raise Unmet("npu_moe_init_routing_v2: dropping rows is not lowered to GE")
    rows, row_map, _ = routed(emit, tokens, ids, _num_experts(ids))
    return rows, row_map


def note_experts(graph: Graph) -> None:
    """Note at ids how many experts they are of: whoever counts them says so."""
    for node in graph.find_nodes(op="call_function", target=ops.expert_counts.default):
        ids, experts = arguments(node)
        ids.meta[_EXPERTS] = experts


def _num_experts(ids: Node) -> int:
    if _EXPERTS not in ids.meta:
        raise Unmet("npu_moe_init_routing_v2: nothing says how many experts there are")
    found: int = ids.meta[_EXPERTS]
    return found


def regroup(emit: Emit, node: Node) -> Lowered:
    rows, recv_counts = arguments(node)
    experts = _arrived(emit, recv_counts, emit.size(rows, 0))
    grouped, row_map, _ = routed(emit, rows, experts, value_of(recv_counts).shape[1])
    return grouped, row_map


def arrived_experts(emit: Emit, node: Node) -> Lowered:
    recv_counts, num_rows = arguments(node)
    return _arrived(emit, recv_counts, num_rows)


def _arrived(emit: Emit, recv_counts: Node, num_rows: Any) -> Node:
    local = value_of(recv_counts).shape[1]
    segment = _segment(emit, emit(aten.reshape.default, recv_counts, [-1]), num_rows)
    return emit(aten.remainder.Scalar, segment, local)


def _segment(emit: Emit, counts: Node, num_rows: Any) -> Node:
    """Of each row which of consecutive segments of ``counts`` rows it is in."""
    device = value_of(counts).device
    rows = emit(aten.arange.default, num_rows, device=device, pin_memory=False)
    ends = emit(aten.unsqueeze.default, emit(aten.cumsum.default, counts, 0), 0)
    past = emit(aten.ge.Tensor, emit(aten.unsqueeze.default, rows, 1), ends)
    return emit(aten.sum.dim_IntList, emit.cast(past, torch.int64), [1])


def row_experts(emit: Emit, node: Node) -> Lowered:
    counts, num_rows = arguments(node)
    last = value_of(counts).shape[0] - 1
    return emit(aten.clamp.default, _segment(emit, counts, num_rows), None, last)


def rank_slices(emit: Emit, node: Node) -> Lowered:
    rows, world, slices = arguments(node)
    tail = value_of(rows).shape[1:]
    each = emit.number(operator.floordiv, emit.size(rows, 0), world)
    by_rank = emit(aten.reshape.default, rows, [world, each, *tail])
    pieces: list[Any] = []
    start: Any = 0
    for at in range(slices):
        # As tensor_split: the first pieces are the larger ones.
        padded = emit.number(operator.add, each, slices - 1 - at)
        end = emit.number(operator.add, start, emit.number(operator.floordiv, padded, slices))
        piece = emit(aten.slice.Tensor, by_rank, 1, start, end)
        pieces.append(emit(aten.reshape.default, piece, [-1, *tail]))
        start = end
    return tuple(pieces)


def unpermute(emit: Emit, node: Node) -> Lowered:
    rows, row_map, weights, shape, missing = arguments(node)
    result = value_of(node)
    rows = emit.cast(emit.flat(rows), result.dtype)
    top_k = experts_per_token(row_map, result)
    if missing:
        rows, row_map = with_empty_row(emit, rows, row_map)
    scales = weights
    if weights is not None:
        scales = emit.cast(emit(aten.reshape.default, weights, [-1, top_k]), result.dtype)
    tokens = emit.npu(
        "npu_moe_finalize_routing",
        rows,
        None,
        None,
        None,
        scales,
        row_map,
        None,
        _TOKEN_MAJOR,
        top_k,
    )
    return tokens if result.dim() == 2 else emit(aten.reshape.default, tokens, list(shape))


def gating(emit: Emit, node: Node) -> Lowered:
    """In ATen calls where no op of the device takes it: GE has no converter for the dialect's."""
    before = len(emit.added)
    try:
        return gating_top_k(emit, node)
    except Unmet:
        emit.undo(before)
    logits, k, score, bias, groups, of_groups, group_score, eps, scale = arguments(node)
    sigmoid = score == "sigmoid"
    tensors = [logits] if bias is None else [logits, bias]

    def gate(logits: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return route(logits, k, score, bias, groups, of_groups, group_score, sigmoid, eps, scale)

    weights, ids = emit.inline(gate, *tensors)
    return weights, ids


def expert_counts(emit: Emit, node: Node) -> Lowered:
    ids, num_experts = arguments(node)
    flat = emit.cast(emit(aten.reshape.default, ids, [-1]), torch.int64)
    none = emit(
        aten.zeros.default,
        [num_experts],
        dtype=torch.int64,
        device=value_of(ids).device,
        pin_memory=False,
    )
    return emit(aten.scatter_add.default, none, 0, flat, emit(aten.ones_like.default, flat))


def exchange_counts(emit: Emit, node: Node) -> Lowered:
    counts, group, _, _, chunks, *_ = arguments(node)
    world = value_of(node).shape[0]
    by_rank = emit(aten.reshape.default, counts, [chunks, world, -1])
    numbers = emit(aten.reshape.default, emit(aten.transpose.int, by_rank, 0, 1), [-1])
    arrived = even_exchange(emit, numbers, group)
    return emit(aten.reshape.default, arrived, [world, -1])


def split_sizes(emit: Emit, node: Node) -> Lowered:
    """On the device: GE reads them there."""
    counts, recv_counts, chunks = arguments(node)
    world = value_of(recv_counts).shape[0]
    sent = emit(aten.reshape.default, counts, [chunks, world, -1])
    received = emit(aten.reshape.default, recv_counts, [world, chunks, -1])
    totals = [
        emit(aten.sum.dim_IntList, sent, [2]),
        emit(aten.transpose.int, emit(aten.sum.dim_IntList, received, [2]), 0, 1),
    ]
    return emit(aten.stack.default, totals, 1)


GE_LOWERINGS: dict[Any, Lowering] = {
    ops.permute.default: permute,
    ops.regroup.default: regroup,
    ops.permute_local.default: permute_local,
    ops.unpermute.default: unpermute,
    ops.grouped_mm.default: grouped_mm,
    ops.grouped_mm_list.default: grouped_mm_list,
    ops.gating_top_k.default: gating,
    ops.expert_counts.default: expert_counts,
    ops.exchange_counts.default: exchange_counts,
    ops.split_sizes.default: split_sizes,
    ops.arrived_experts.default: arrived_experts,
    ops.row_experts.default: row_experts,
    ops.rank_slices.default: rank_slices,
    **mc2.LOWERINGS,
}
