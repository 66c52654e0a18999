"""The parts of a local layer's experts that one op can stand for: tables, biases, what is between.

Contract. ``fused_parts(emitter)`` emits the experts as strategy "local" does and reads what came
out, so that it does not matter how the graph brought rows to tables: there are grouped matmuls,
``index`` of a table by the rows' experts, and ops on rows. Raises `Unfused` for what is not rows ->
one or two matmuls -> ops on rows -> one matmul. What it emitted is dead code, but for tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.compat import FakeValues
from moe_fx.graph.nodes import VIEWS, shape, value
from moe_fx.passes.strategies.activation import Middle, Unfused, name_of
from moe_fx.passes.strategies.emitter import Emitter
from moe_fx.passes.strategies.local import permuted

aten = torch.ops.aten
ops = torch.ops.moe_fx

_RESHAPES = (
    *VIEWS,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.alias.default,
    aten.flatten.using_ints,
)
"""Of rows, each of which keeps its entries in their order."""


@dataclass(frozen=True)
class Multiplied:
    """A matmul of rows with their experts' matrices ``table [E, K, N]``. bias: ``[E, ...]`` that is
    added to its result in ``added``."""

    node: Node
    table: Node
    bias: Node | None = None
    added: Node | None = None


@dataclass(frozen=True)
class FusedParts:
    """first: one matmul with gate and up, or one with each, in graph order; between: the nodes from
    their results to what ``down`` multiplies, and the constants that these read."""

    first: tuple[Multiplied, ...]
    down: Multiplied
    between: tuple[Node, ...]
    result: Node
    given: dict[Node, Tensor | None]

    def middle(self, values: FakeValues) -> Middle:
        """What the activation is read off."""
        sizes = [_sizes(each.table, values) for each in (*self.first, self.down)]
        *first, down = [(int(size[1]), int(size[2])) for size in sizes]
        if len({columns for _, columns in first}) != 1:
            raise Unfused("the experts' two first matmuls are not equally wide")
        return Middle(
            self.between,
            tuple(each.node for each in self.first),
            self.result,
            self.given,
            columns=first[0][1],
            inner=down[0],
        )


def fused_parts(emitter: Emitter) -> FusedParts:
    counts = emitter.call(ops.expert_counts.default, emitter.parts.ids, emitter.plan.num_experts)
    rows, _ = permuted(emitter)
    return _Reader(rows, emitter.experts(rows, counts)).read()


class _Reader:
    def __init__(self, rows: Node, result: Node) -> None:
        self.rows, self.end = rows, result
        self.given: dict[Node, Tensor | None] = {}
        self.first: dict[Node, Multiplied] = {}

    def read(self) -> FusedParts:
        down = self._down()
        hidden: Any = down.node.args[0]
        between = self._between(hidden)
        first = tuple(sorted(self.first.values(), key=lambda each: each.node))
        if not 1 <= len(first) <= 2:
            raise Unfused(f"the experts multiply the tokens with {len(first)} tables, not 1 or 2")
        return FusedParts(first, down, between, hidden, self.given)

    def _down(self) -> Multiplied:
        """The last matmul: behind it come a bias, and casts to where weights are multiplied."""
        node = self.end
        while True:
            if node.target in _RESHAPES or _widens(node):
                node = _source(node)
                continue
            if node.target is aten.add.Tensor:
                product = next((n for n in node.all_input_nodes if not _of_experts(n)), node)
                matmul = self._matmul(_behind_reshapes(product))
                if matmul.added is node:
                    return matmul
            elif _is_matmul(node):
                return self._matmul(node)
            raise Unfused(f"{name_of(node)} follows the experts' last matmul")

    def _matmul(self, node: Node) -> Multiplied:
        if node.target is ops.grouped_mm_list.default:
            raise Unfused("the experts' weights are tensors of their own, not one table")
        if node.target is not ops.grouped_mm.default:
            raise Unfused(f"{name_of(node)} follows the experts' last matmul")
        table: Any = node.args[1]
        reader = _only_reader(node)
        if reader is not None and reader.target is aten.add.Tensor and len(reader.args) == 2:
            others = [n for n in reader.all_input_nodes if _of_experts(n)]
            if len(others) == 1 and "alpha" not in reader.kwargs:
                return Multiplied(node, table, _source(others[0]), reader)
        return Multiplied(node, table)

    def _between(self, hidden: Node) -> tuple[Node, ...]:
        found: set[Node] = set()
        stack = [hidden]
        while stack:
            node = stack.pop()
            if node in found or node in self.first or node in self.given:
                continue
            if _is_matmul(node):
                self.first[node] = self._first(node)
            elif node.target is aten.sym_size.int and _source(node) is self.rows:
                self.given[node] = None
            elif _of_experts(node):
                self._note_bias(node)
            elif node.op != "call_function":
                self._note_constant(node)
            elif node is self.rows or node.target in (ops.row_experts.default,):
                raise Unfused("the tokens' rows are read between the experts' matmuls")
            else:
                found.add(node)
                stack += node.all_input_nodes
        return tuple(sorted(found))

    def _first(self, node: Node) -> Multiplied:
        matmul = self._matmul(node)
        rows: Any = node.args[0]
        source = _behind_reshapes(rows)
        if _is_matmul(source):
            raise Unfused("the experts have more than two matmuls one after the other")
        if source is not self.rows:
            raise Unfused(f"the tokens' rows go through {name_of(source)} before the first matmul")
        return matmul

    def _note_bias(self, entries: Node) -> None:
        """What is added to a product counts as 0 between the matmuls: it is the op's argument."""
        (reader,) = entries.users
        product = next((n for n in reader.all_input_nodes if n is not entries), entries)
        matmul = _behind_reshapes(product)
        added = self._matmul(matmul).added if _is_matmul(matmul) else None
        if added is not reader:
            raise Unfused(
                f"{name_of(reader)} reads a table of experts, {_source(entries).name}, that is no "
                "bias of a matmul"
            )
        self.given[entries] = torch.zeros((), dtype=torch.float64)

    def _note_constant(self, node: Node) -> None:
        known = node.meta.get("real")
        if not isinstance(known, Tensor) or known.numel() != 1:
            raise Unfused(f"{node.name} is read between the experts' matmuls, and is no constant")
        self.given[node] = known


def _sizes(table: Node, values: FakeValues) -> tuple[Any, ...]:
    """The dims of a table, which may have been emitted just now."""
    stack = [table]
    while stack:
        node = stack[-1]
        missing = [n for n in node.all_input_nodes if value(n) is None]
        if value(node) is not None or not missing:
            stack.pop()
            if value(node) is None:
                values.compute(node)
            continue
        stack += missing
    return shape(table)


def _source(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def _behind_reshapes(node: Node) -> Node:
    while node.target in _RESHAPES:
        node = _source(node)
    return node


def _only_reader(node: Node) -> Node | None:
    """The one op that reads ``node``, through reshapes that nothing else reads."""
    while len(node.users) == 1:
        (node,) = node.users
        if node.target not in _RESHAPES:
            return node
    return None


def _is_matmul(node: Node) -> bool:
    return node.target in (ops.grouped_mm.default, ops.grouped_mm_list.default)


def _of_experts(node: Node) -> bool:
    """Whether ``node`` holds each row's entry of a table."""
    if node.target is not aten.index.Tensor:
        return False
    indices: Any = node.args[1]
    return len(indices) == 1 and indices[0].target is ops.row_experts.default


def _widens(node: Node) -> bool:
    """A cast to what no result of experts is too wide for."""
    if node.target is not aten._to_copy.default or node.kwargs.keys() != {"dtype"}:
        return False
    return node.kwargs["dtype"] is torch.float32
