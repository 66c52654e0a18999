"""What a node of a captured graph costs, in seconds, for `schedule`.

Matrix products cost what was measured for their shapes (`moe_fx.cost.rates`), other ops the bytes
they read and write, views nothing, exchanges what the group's link says (`moe_fx.cost.link`). Sizes
that are symbols count as at capture. The rows of a piece of an exchange, which only the run will
tell, count as the mean: all pairs over the pieces sent, and as many received as sent.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moe_fx.compat import number, resolve_group, symbols
from moe_fx.cost.link import known
from moe_fx.cost.rates import Compute, measured
from moe_fx.graph.nodes import VIEWS, argument
from moe_fx.ops.cuts import shares

aten = torch.ops.aten
ops = torch.ops.moe_fx

_UNKNOWN = 64
UNKNOWN_EXCHANGE = 1e3
"""Seconds, where no link was measured: all that can be is done meanwhile."""
_VIEWS = (
    *VIEWS,
    operator.getitem,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.slice.Tensor,
    aten.select.int,
    aten.split.Tensor,
    aten.alias.default,
    aten.detach.default,
)
_WEIGHT_GRADIENTS = (
    ops.grouped_mm_grad_weight.default,
    ops.grouped_mm_grad_weight_sum.default,
)
MATMULS: dict[Any, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.linear.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.baddbmm.default: (1, 2),
    aten.addmm.default: (1, 2),
    ops.grouped_mm.default: (0, 1),
    ops.grouped_mm_list.default: (0, 1),
    **dict.fromkeys(_WEIGHT_GRADIENTS, (0, 1)),
}


_FILLED = (ops.grouped_mm.default, ops.grouped_mm_list.default)
_MEASURED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""Other matrix products count as the bytes they read and write."""
_FREE = (
    ops.all_to_all.default,
    ops.split_sizes.default,
    ops.cut_rows.default,
    ops.even_sizes.default,
)
_SENT: dict[Any, int] = {
    ops.wait.default: 1,
    ops.wait_after.default: 1,
    torch.ops._c10d_functional.all_to_all_single.default: 0,
}
"""Op whose result holds received rows -> position of the rows sent."""


def is_heavy(node: Node) -> bool:
    """Worth its place in an order: a matrix product, or an op that no compiler fuses, with one
    tensor as result."""
    if node.target in MATMULS:
        return True
    fused = getattr(node.target, "namespace", "aten") in ("aten", "prims")
    return not fused and isinstance(node.meta.get("val"), Tensor)


class GraphCosts:
    """Of nodes with ``meta["val"]``; a node without costs nothing."""

    def __init__(self, graph: Graph) -> None:
        self.rows: dict[Any, int] = {}
        self._sizes: dict[Node, int] = {}
        for node in graph.nodes:
            self._note_rows(node)

    def compute(self, node: Node) -> float:
        if node.op != "call_function" or node.target in _VIEWS:
            return 0.0
        tensors = list(_tensors(node.meta.get("val")))
        if not tensors or node.target in (ops.wait.default, ops.wait_after.default):
            return 0.0
        device = tensors[0].device
        if node.target in MATMULS and tensors[0].dtype in _MEASURED:
            return self._matmul(node, measured(device, tensors[0].dtype))
        if node.target in _FREE:
            return 0.0
        moved = self.bytes(node) + sum(map(self.bytes, node.all_input_nodes))
        return measured(device, torch.float32).copy_seconds(moved / 2)

    def exchange(self, node: Node) -> float:
        """As one of several in flight."""
        rows: Any = node.args[0]
        if "val" not in rows.meta:
            return UNKNOWN_EXCHANGE
        group = resolve_group(node.args[3])  # type: ignore[arg-type]
        world = group.size()
        link = known(group, rows.meta["val"].device)
        if link is None:
            return UNKNOWN_EXCHANGE
        return link.latency + self.bytes(rows) * (world - 1) / world * link.busy

    def base(self, node: Node) -> Node:
        """The node whose storage ``node`` shows."""
        while node.target in _VIEWS and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node

    def bytes(self, node: Node) -> int:
        """Of a node's result."""
        if node not in self._sizes:
            self._sizes[node] = sum(
                math.prod(map(self.size, tensor.shape)) * tensor.element_size()
                for tensor in _tensors(node.meta.get("val"))
            )
        return self._sizes[node]

    def size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        return number(size, symbols([size], _UNKNOWN) | self._known([size]))

    def _known(self, sizes: Iterable[Any]) -> dict[Any, int]:
        return {
            symbol: self.rows[symbol] for symbol in symbols(sizes, _UNKNOWN) if symbol in self.rows
        }

    def _note_rows(self, node: Node) -> None:
        val = node.meta.get("val")
        if node.target in (ops.permute_chunks.default, ops.permute_cut.default) and val is not None:
            keys: Any = node.args[1]
            pairs = math.prod(map(self.size, keys.meta["val"].shape))
            parts = [1] * len(val[0])
            if node.target is ops.permute_cut.default:
                parts = shares(len(val[0]) - 2)
            for piece, part in zip(val[0], parts, strict=True):
                self._note(piece, pairs * part // sum(parts))
        elif node.target in _SENT and val is not None:
            sent: Any = node.args[_SENT[node.target]]
            self._note(val, self.size(sent.meta["val"].shape[0]))

    def _note(self, rows: Tensor, count: int) -> None:
        for symbol in symbols([rows.shape[0]], _UNKNOWN):
            self.rows.setdefault(symbol, count)

    def _matmul(self, node: Node, compute: Compute) -> float:
        left: Any
        right: Any
        left, right = (node.args[at] for at in MATMULS[node.target])
        if node.target in _WEIGHT_GRADIENTS:
            experts, inner, outer = self._dims(node)
            pieces = left if isinstance(left, list) else [left]
            all_rows = sum(self._dims(piece)[0] for piece in pieces)
            return compute.gemm_seconds(all_rows / experts, inner, outer, experts)
        separate = len(right) if isinstance(right, list) else 0
        rows = self._dims(left)
        weight = self._dims(right[0] if isinstance(right, list) else right)
        fill: Any = argument(node, 3, "fill") if node.target in _FILLED else None
        fill = 1.0 if fill is None else fill
        if len(weight) == 3:
            each = rows[1] if len(rows) == 3 else fill * rows[0] / weight[0]
            return compute.gemm_seconds(each, rows[-1], weight[-1], weight[0])
        out = weight[0] if node.target is aten.linear.default else weight[-1]
        groups = max(1, separate)
        return compute.gemm_seconds(fill * math.prod(rows[:-1]) / groups, rows[-1], out, groups)

    def _dims(self, node: Any) -> list[int]:
        return [self.size(size) for size in node.meta["val"].shape]


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
