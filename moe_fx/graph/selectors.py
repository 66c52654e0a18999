"""The ops that select experts, and a cheap test whether a graph may have any."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moe_fx.graph.nodes import ELEMENTWISE_COPIES, argument, is_integer, shape, value

aten = torch.ops.aten

LOOKUPS: dict[Any, tuple[int, int]] = {
    aten.index.Tensor: (0, 1),
    aten.index_select.default: (0, 2),
    aten.embedding.default: (0, 1),
}
"""op -> positions of the table and of its index."""
SORTS = (aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable)
SELECTS = (aten.topk.default, aten.max.dim, aten.argmax.default, *SORTS)


def is_selector(node: Node) -> bool:
    """Whether ``node`` picks indices by floating scores, or looks ids up in an integer table."""
    if node.target is aten.topk.default:
        return True
    if node.target in SELECTS and _is_node(node.args[0]):
        scores = value(node.args[0])
        if not isinstance(scores, Tensor) or not scores.dtype.is_floating_point:
            return False
        if node.target in SORTS:
            return scores.dim() > 1 and bool(_given(node).get("descending"))
        return node.target is not aten.argmax.default or dim_of(node) is not None
    return is_lookup_of_ids(node)


def is_lookup_of_ids(node: Node) -> bool:
    at = LOOKUPS.get(node.target)
    if at is None or not is_integer(node):
        return False
    table = node.args[at[0]]
    while isinstance(table, Node) and table.target in ELEMENTWISE_COPIES:
        table = table.args[0]
    return (
        isinstance(table, Node) and table.op in ("placeholder", "get_attr") and bool(shape(table))
    )


def _given(node: Node) -> dict[str, Any]:
    names = node.target._schema.arguments  # type: ignore[union-attr]
    return {a.name: v for a, v in zip(names, node.args, strict=False)} | node.kwargs


def dim_of(node: Node) -> Any:
    default = None if node.target is aten.argmax.default else -1
    return _given(node).get("dim", default)


def keep_dim(node: Node) -> None:
    """``max`` or ``argmax`` that drops the dim: keep it, and squeeze what their users read."""
    if node.target not in (aten.max.dim, aten.argmax.default) or argument(node, 2, "keepdim"):
        return
    dim = dim_of(node)
    if dim % len(shape(node.args[0])) != len(shape(node.args[0])) - 1:
        return
    node.args, node.kwargs = (node.args[0], dim, True), {}
    results = [node] if node.target is aten.argmax.default else list(node.users)
    if node.target is aten.max.dim:
        node.meta["val"] = type(value(node))([v.unsqueeze(-1) for v in value(node)])
    for result in results:
        before, readers = value(result), list(result.users)
        result.meta["val"] = before.unsqueeze(-1)
        with result.graph.inserting_after(result):
            squeezed = result.graph.call_function(aten.squeeze.dim, (result, -1))
        squeezed.meta = {**result.meta, "val": before}
        for reader in readers:
            reader.replace_input_with(result, squeezed)


# -- at any level ----------------------------------------------------------------------------------

_CERTAIN_SIGNS = frozenset(
    ("topk", "histc", "bincount", "_grouped_mm", "grouped_mm", "grouped_mm_fallback")
)
_SIGNS = _CERTAIN_SIGNS | {"sort", "argsort", "one_hot"}


def may_select_experts(module: GraphModule, *, certain: bool = False) -> bool:
    """Cheap test on a graph at any level, subgraphs included: may it hold an MoE layer? With
    ``certain``, by signs that hardly anything else has."""
    return next(signs(module, certain=certain), None) is not None


def signs(module: GraphModule, *, certain: bool = False) -> Iterator[Node]:
    """The nodes that `may_select_experts` goes by."""
    names = _CERTAIN_SIGNS if certain else _SIGNS
    for graph_module in module.modules():
        if isinstance(graph_module, GraphModule):
            for node in graph_module.graph.nodes:
                if node.op in ("call_function", "call_method") and (
                    op_name(node) in names
                    or _gathers_matrices(node)
                    or (not certain and _compares(node))
                ):
                    yield node


def op_name(node: Node) -> str:
    """Of ``ids == 1`` too, which is the method ``__eq__`` in Dynamo's graphs of torch 2.11."""
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    return name.removeprefix("__").removesuffix("__")


def _is_node(argument: Any) -> bool:
    return isinstance(argument, Node)


def _example(node: Any) -> Any:
    return node.meta.get("example_value", node.meta.get("val")) if _is_node(node) else None


def _gathers_matrices(node: Node) -> bool:
    """``weight[ids]`` of a weight with a matrix per expert."""
    if op_name(node) not in ("getitem", "index", "index_select", "embedding"):
        return False
    table = _example(node.args[0])
    if not isinstance(table, Tensor) or table.dim() < 3:
        return False
    indices = [i for i in node.all_input_nodes[1:] if isinstance(_example(i), Tensor)]
    return len(indices) == 1 and not _example(indices[0]).dtype.is_floating_point


def _compares(node: Node) -> bool:
    """``ids == 1`` of integers ``ids`` that are compared with 0 as well."""
    if op_name(node) != "eq" or len(node.args) < 2 or type(node.args[1]) is not int:
        return False
    ids = node.args[0]
    if node.args[1] != 1 or not _is_node(ids) or not isinstance(_example(ids), Tensor):
        return False
    return any(
        op_name(user) == "eq" and user.args[0] is ids and user.args[1] == 0
        for user in ids.users  # type: ignore[union-attr]
    )
