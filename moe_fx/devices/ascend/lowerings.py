"""What each dialect op becomes on an NPU, for the compilers that run ACLNN ops as the graph says:
npugraph_ex, and eager. For torchair, whose GE graphs know other ops: `ge_lowerings.py`.

``LOWERINGS[op](emit, node)`` adds what takes ``node``'s place and returns it, or raises `Unmet`:
then the dialect op stays, which runs in ATen calls.

| dialect | torch_npu |
|---|---|
| permute, permute_chunks, regroup | npu_moe_token_permute (regroup: by the experts that arrive) |
| permute_local | npu_moe_init_routing_v2 |
| unpermute, unpermute_chunks | npu_moe_token_unpermute; unweighted: npu_moe_token_permute_grad_v2 |
| unpermute_grad | npu_moe_token_unpermute_grad |
| grouped_mm, grouped_mm_list, grouped_mm_grad_weight | npu_grouped_matmul |
| distribute, collect | npu_moe_distribute_dispatch_v2, npu_moe_distribute_combine_v2 |
| gating_top_k | npu_moe_gating_top_k, npu_moe_gating_top_k_softmax |
| silu of one half of the features times the other | npu_swiglu |
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from moe_fx.devices.ascend import mc2
from moe_fx.devices.ascend.emit import Emit, Unmet, value_of

aten = torch.ops.aten
ops = torch.ops.moe_fx

Lowered = Node | tuple[Any, ...]
Lowering = Callable[[Emit, Node], Lowered]

ENDS = 0
"""``group_list_type`` of a list of where each group ends."""


def arguments(node: Node) -> list[Any]:
    """All arguments of an op of the dialect, in the schema's order."""
    schema = node.target._schema  # type: ignore[union-attr]
    given = [*node.args, *[None] * (len(schema.arguments) - len(node.args))]
    for at, argument in enumerate(schema.arguments[len(node.args) :], len(node.args)):
        given[at] = node.kwargs.get(argument.name, argument.default_value)
    return given


def permute(emit: Emit, node: Node) -> Lowered:
    tokens, ids, num_out_tokens = arguments(node)
    rows, row_map = permuted(emit, tokens, ids, num_out_tokens)
    return rows, row_map


def permuted(emit: Emit, tokens: Node, ids: Node, most: Any = None) -> tuple[Node, Node]:
    """(rows in ``tokens``' trailing shape, row_map)."""
    if value_of(ids).dim() == 1:
        ids = emit(aten.unsqueeze.default, ids, 1)
    both = emit.npu("npu_moe_token_permute", emit.flat(tokens), ids, most)
    return _like(emit, emit.item(both, 0), tokens), emit.item(both, 1)


def _like(emit: Emit, rows: Node, tokens: Node) -> Node:
    tail = value_of(tokens).shape[1:]
    if len(tail) == 1:
        return rows
    return emit(aten.reshape.default, rows, [emit.size(rows, 0), *tail])


def permute_chunks(emit: Emit, node: Node) -> Lowered:
    tokens, keys, sizes = arguments(node)
    rows, row_map = permuted(emit, tokens, keys)
    sent = emit(aten.select.int, sizes, 1, 0)
    totals = emit(aten.sum.dim_IntList, sent, [1])
    chunks = value_of(sizes).shape[0]
    counts = [
        emit(aten._local_scalar_dense.default, emit(aten.select.int, totals, 0, at))
        for at in range(chunks)
    ]
    start: Any = 0
    pieces = []
    for count in counts:
        end = emit.number(operator.add, start, count)
        pieces.append(emit(aten.slice.Tensor, rows, 0, start, end))
        start = end
    return pieces, row_map


def regroup(emit: Emit, node: Node) -> Lowered:
    rows, recv_counts = arguments(node)
    experts = emit(ops.arrived_experts.default, recv_counts, emit.size(rows, 0))
    return permuted(emit, rows, experts)


def routed(
    emit: Emit, tokens: Node, ids: Node, experts: int, own: tuple[int, int] | None = None
) -> tuple[Node, Node, Node]:
    """(rows of the experts ``own``, row_map with -1 for others, counts of ``own``)."""
    if value_of(ids).dim() == 1:
        ids = emit(aten.reshape.default, ids, [-1, 1])
    both = emit.npu(
        "npu_moe_init_routing_v2",
        emit.flat(tokens),
        emit.cast(ids, torch.int32),
        active_num=-1,
        expert_num=experts,
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
        active_expert_range=list(own or (0, experts)),
        row_idx_type=0,
    )
    rows, row_map, counts = (emit.item(both, at) for at in range(3))
    tail = value_of(tokens).shape[1:]
    if len(tail) != 1:
        rows = emit(aten.reshape.default, rows, [-1, *tail])
    return rows, row_map, counts


def permute_local(emit: Emit, node: Node) -> Lowered:
    tokens, ids, first, local, world, most, capacity_factor, _ = arguments(node)
    if capacity_factor is not None:
        raise Unmet("npu_moe_init_routing_v2: a capacity_factor is not lowered")
    rows, row_map, counts = routed(emit, tokens, ids, world * local, (first, first + local))
    room = value_of(node)[0].shape[0]
    if not isinstance(room, int):
        room = emit(operator.mul, emit.size(tokens, 0), most)
    if most < value_of(ids).shape[1]:
        rows = emit(aten.slice.Tensor, rows, 0, 0, room)
    nowhere = emit(aten.lt.Scalar, row_map, 0)
    row_map = emit(aten.where.self, nowhere, _number(emit, room, row_map), row_map)
    return rows, row_map, counts


def _number(emit: Emit, number: Any, like: Node) -> Node:
    value = value_of(like)
    return emit(
        aten.full.default, [1], number, dtype=value.dtype, device=value.device, pin_memory=False
    )


def unpermute(emit: Emit, node: Node) -> Lowered:
    rows, row_map, weights, shape, missing = arguments(node)
    return unpermuted(emit, node, rows, row_map, weights, shape, missing)


def unpermuted(
    emit: Emit, node: Node, rows: Node, row_map: Node, weights: Any, shape: Any, missing: bool
) -> Node:
    result = value_of(node)
    rows = emit.cast(emit.flat(rows), result.dtype)
    top_k = experts_per_token(row_map, result)
    if missing or _may_miss(rows, row_map):
        rows, row_map = with_empty_row(emit, rows, row_map)
    if weights is not None:
        scales = emit.cast(weights, result.dtype)
        if value_of(scales).dim() != 2:
            scales = emit(aten.reshape.default, scales, [-1, top_k])
        tokens = emit.npu("npu_moe_token_unpermute", rows, row_map, scales)
    elif top_k == 1:
        tokens = emit.npu("npu_moe_token_unpermute", rows, row_map)
    else:
        tokens = emit.npu(
            "npu_moe_token_permute_grad_v2", rows, row_map, shape[0], result.dtype, top_k
        )
    if result.dim() == 2:
        return tokens
    return emit(aten.reshape.default, tokens, list(shape))


def _may_miss(rows: Node, row_map: Node) -> bool:
    """Whether there are fewer rows than pairs, as after a permute that drops."""
    have, pairs = value_of(rows).shape[0], value_of(row_map).shape[0]
    return isinstance(have, int) and isinstance(pairs, int) and have < pairs


def with_empty_row(emit: Emit, rows: Node, row_map: Node) -> tuple[Node, Node]:
    """Behind all rows one of zeros, which pairs without a row get."""
    none = emit.size(rows, 0)
    width = value_of(rows).shape[1]
    row = emit(aten.new_zeros.default, rows, [1, width])
    return (
        emit(aten.cat.default, [rows, row]),
        emit(aten.clamp.default, row_map, None, none),
    )


def experts_per_token(row_map: Node, result: torch.Tensor) -> int:
    """Experts per token."""
    pairs, tokens = value_of(row_map).shape[0], result.shape[0]
    if tokens is pairs or tokens == pairs:
        return 1
    top_k = pairs // tokens
    if isinstance(top_k, torch.SymInt):
        known = top_k.node.maybe_as_int()
        if known is None:
            raise Unmet(
                f"how many experts a token has is not known: {pairs} pairs, {tokens} tokens"
            )
        top_k = known
    return int(top_k)


def unpermute_chunks(emit: Emit, node: Node) -> Lowered:
    rows, row_map, weights, shape = arguments(node)
    joined = emit(aten.cat.default, list(rows))
    return unpermuted(emit, node, joined, row_map, weights, shape, missing=True)


def unpermute_grad(emit: Emit, node: Node) -> Lowered:
    grad, row_map, rows, weights, _, shape, _, missing = arguments(node)
    if weights is None or rows is None:
        raise Unmet("npu_moe_token_unpermute_grad: only for weighted rows of more than one expert")
    if missing or len(shape) != 2:
        raise Unmet("npu_moe_token_unpermute_grad: some pairs may have no row")
    both = emit.npu("npu_moe_token_unpermute_grad", rows, grad, row_map, weights)
    return emit.item(both, 0), emit.item(both, 1)


def grouped_mm(emit: Emit, node: Node) -> Lowered:
    rows, weight, offsets, _ = arguments(node)
    return multiplied(emit, rows, [weight], offsets)


def grouped_mm_list(emit: Emit, node: Node) -> Lowered:
    rows, weights, offsets, _ = arguments(node)
    if value_of(rows).dtype == torch.float32:
        weights = [emit(aten.stack.default, list(weights))]
    return multiplied(emit, rows, list(weights), offsets)


def multiplied(
    emit: Emit, rows: Node, weights: list[Node], offsets: Node, group_type: int = 0
) -> Node:
    """Rows behind the last group keep whatever the op leaves there: nobody reads them."""
    products = emit.npu(
        "npu_grouped_matmul",
        [rows],
        weights,
        group_list=emit.cast(offsets, torch.int64),
        split_item=3,
        group_type=group_type,
        group_list_type=ENDS,
    )
    return emit.item(products, 0)


def grouped_mm_grad_weight(emit: Emit, node: Node) -> Lowered:
    rows, grad, offsets = arguments(node)
    return multiplied(emit, emit(aten.t.default, rows), [grad], offsets, group_type=2)


def gating_top_k(emit: Emit, node: Node) -> Lowered:
    logits, k, score, bias, num_groups, topk_group, group_score, eps, scale = arguments(node)
    logits = emit.cast(logits, torch.float32)
    if score == "softmax" and bias is None and num_groups == 1 and scale == 1.0:
        gated = emit.npu("npu_moe_gating_top_k_softmax", logits, None, k)
    else:
        gated = emit.npu(
            "npu_moe_gating_top_k",
            logits,
            k,
            bias=None if bias is None else emit.cast(bias, torch.float32),
            k_group=topk_group,
            group_count=num_groups,
            group_select_mode=int(group_score == "top2"),
            renorm=0,
            norm_type=int(score == "sigmoid"),
            routed_scaling_factor=scale,
            eps=eps,
        )
    return emit.item(gated, 0), emit.cast(emit.item(gated, 1), torch.int64)


def swiglu(emit: Emit, node: Node) -> Lowered:
    """``node``: a product."""
    halves = _halves(node)
    if halves is None:
        raise Unmet("not the silu of one half of the features times the other")
    return emit.npu("npu_swiglu", halves, -1)


def is_swiglu(node: Node) -> bool:
    return node.target is aten.mul.Tensor and _halves(node) is not None


def _halves(node: Node) -> Node | None:
    """What both factors are halves of, the first half under the silu."""
    factors = [n for n in node.args if isinstance(n, Node)]
    for gate, up in (factors, factors[::-1]) if len(factors) == 2 else ():
        if gate.target is not aten.silu.default or len(gate.users) != 1:
            continue
        found = _half(gate.args[0]), _half(up)
        if found[0] and found[1] and found[0][0] is found[1][0]:
            source, first = found[0]
            if first == 0 and found[1][1] == 1:
                return source
    return None


def _half(node: Any) -> tuple[Node, int] | None:
    """(what it is a half of, which) of the last dimension."""
    if not isinstance(node, Node) or not node.args or not isinstance(node.args[0], Node):
        return None
    source = node.args[0]
    if node.target is aten.slice.Tensor:
        width, half = value_of(source).shape[-1], value_of(node).shape[-1]
        rest: list[Any] = [*node.args[1:], *[0, 0, None, 1][len(node.args) - 1 :]]
        dim, start, _, step = rest[:4]
        last = dim in (-1, value_of(source).dim() - 1)
        if last and step == 1 and width == 2 * half and (start or 0) in (0, half):
            return source, 0 if not start else 1
        return None
    return _half_of_split(source, node.args[1]) if node.target is operator.getitem else None


def _half_of_split(split: Node, index: Any) -> tuple[Node, int] | None:
    if split.target not in (
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.chunk.default,
    ):
        return None
    whole = split.args[0]
    assert isinstance(whole, Node)
    pieces = value_of(split)
    dim = split.args[2] if len(split.args) > 2 else split.kwargs.get("dim", 0)
    last = dim in (-1, value_of(whole).dim() - 1)
    if last and len(pieces) == 2 and pieces[0].shape == pieces[1].shape and index in (0, 1):
        return whole, int(index)
    return None


LOWERINGS: dict[Any, Lowering] = {
    ops.permute.default: permute,
    ops.permute_chunks.default: permute_chunks,
    ops.regroup.default: regroup,
    ops.permute_local.default: permute_local,
    ops.unpermute.default: unpermute,
    ops.unpermute_chunks.default: unpermute_chunks,
    ops.unpermute_grad.default: unpermute_grad,
    ops.grouped_mm.default: grouped_mm,
    ops.grouped_mm_list.default: grouped_mm_list,
    ops.grouped_mm_grad_weight.default: grouped_mm_grad_weight,
    ops.gating_top_k.default: gating_top_k,
    **mc2.LOWERINGS,
}
