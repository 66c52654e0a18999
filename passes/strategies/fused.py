"""Strategy "local", fused: all of the layer behind its router in one op. (Of "direct":
`passes/strategies/direct.py`.)

Pseudo-code::

    out = fused_experts(tokens, ids, weights, gate_up, up, down, biases, activation)
    (in training: the first result of fused_experts_training)

Contract. ``read(region)`` says what the experts compute between their matmuls, or raises `Unfused`
with what stands in the way; ``fused`` emits a region that could be read. Tables reach the op as
they are in the graph: parameters, or views of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.compat import FakeValues
from moe_fx.graph.nodes import VIEWS, shape, value
from moe_fx.passes.evaluate.extract import Extract
from moe_fx.passes.strategies.activation import Unfused, name_of, read_activation
from moe_fx.passes.strategies.combine import sums_plainly, weights_of_sum
from moe_fx.passes.strategies.emitter import Emitter
from moe_fx.passes.strategies.fused_parts import FusedParts, fused_parts
from moe_fx.plan import ExchangePlan, Fused
from moe_fx.region import Parts, Region

aten = torch.ops.aten
ops = torch.ops.moe_fx

__all__ = ["Unfused", "fused", "fused_arguments", "read"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TABLE_VIEWS = (
    *VIEWS,
    aten.transpose.int,
    aten.permute.default,
    aten.mT.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.alias.default,
    aten.detach.default,
)


def fused(emitter: Emitter) -> Node:
    parts, body = emitter.parts, emitter.plan.fused
    assert body is not None
    weights = weights_of_sum(emitter) if parts.weights is not None else None
    arguments = fused_arguments(emitter, parts.tokens, parts.ids, weights)
    if body.trains:
        return emitter.item(emitter.call(ops.fused_experts_training.default, *arguments), 0)
    return emitter.call(ops.fused_experts.default, *arguments)


def fused_arguments(
    emitter: Emitter, tokens: Node, ids: Node, weights: Node | None
) -> tuple[Any, ...]:
    """Of ``moe_fx::fused_experts``, with the tables of this rank's experts. ids: among those."""
    body = emitter.plan.fused
    assert body is not None
    read = fused_parts(emitter)
    gate, *others = reversed(read.first) if body.up_first else read.first
    up = others[0] if others else None
    return (
        tokens,
        ids,
        weights,
        gate.table,
        None if up is None else up.table,
        read.down.table,
        _matrix(emitter, gate.bias),
        None if up is None else _matrix(emitter, up.bias),
        _matrix(emitter, read.down.bias),
        *(body.layout, body.act, body.alpha, body.limit, body.shift),
        value(emitter.parts.combined).dtype,
    )


def _matrix(emitter: Emitter, bias: Node | None) -> Node | None:
    """``[E, N]``."""
    if bias is None or len(shape(bias)) == 2:
        return bias
    return emitter.call(aten.reshape.default, bias, [emitter.plan.local_experts, -1])


def read(alone: Extract, region: Region) -> Fused:
    """What the op is told of the experts. region: that of the extracted nodes, whose graph is left
    with more dead code than it had."""
    parts, graph = region.parts, alone.module.graph
    _check_ends(parts)
    plan = ExchangePlan("local", region.num_experts, region.num_experts)
    with graph.inserting_before(parts.combined):
        found = fused_parts(Emitter(graph, parts, plan))
    _check_tables(found, parts, alone)
    return read_activation(found.middle(FakeValues(graph)))


def _check_ends(parts: Parts) -> None:
    if parts.weighs_tokens:
        raise Unfused("the routing weights multiply the tokens")
    if not sums_plainly(parts):
        raise Unfused("the experts' rows are not just weighted and summed")
    if any(len(shape(node)) != 2 for node in (parts.tokens, parts.combined)):
        raise Unfused("a token has several dimensions")
    if len(shape(parts.ids)) != 2:
        raise Unfused("the expert ids have no two dimensions")
    dtype = value(parts.tokens).dtype
    if dtype not in _DTYPES:
        raise Unfused(f"the tokens are {_dtype(dtype)}")


def _check_tables(found: FusedParts, parts: Parts, alone: Extract) -> None:
    placeholders = alone.module.graph.find_nodes(op="placeholder")
    originals = dict(zip(placeholders, alone.inputs, strict=True))
    dtype = value(parts.tokens).dtype
    for each in (*found.first, found.down):
        for what, table in (("weights", each.table), ("biases", each.bias)):
            if table is None:
                continue
            root = _root(table, originals)
            if root.op not in ("placeholder", "get_attr"):
                _refuse_computed(root, what)
            if value(root).dtype != dtype:
                given = _dtype(value(root).dtype)
                raise Unfused(f"the experts' {what} are {given}, the tokens {_dtype(dtype)}")


def _root(table: Node, originals: dict[Node, Node]) -> Node:
    """What ``table`` is a view of, in the captured graph."""
    node = table
    while True:
        node = originals.get(node, node)
        if node.target not in _TABLE_VIEWS or not isinstance(value(node.args[0]), Tensor | None):
            return node
        source: Any = node.args[0]
        node = source


def _refuse_computed(root: Node, what: str) -> None:
    if root.target is aten.stack.default:
        raise Unfused(f"the experts' {what} are tensors of their own, not one table")
    raise Unfused(f"the experts' {what} are computed in the forward ({name_of(root)})")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
