"""Values of a captured body in the layout of rows, and what the rules for them share.

See `row_layout.py` for the contract; `layout_moves.py` and `layout_matmuls.py` hold its rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_fx.graph.nodes import FRESH_BUFFERS, same, shape, tensor_inputs
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.evaluate.extract import structure_of

aten = torch.ops.aten

Kind = Literal["rows", "table", "constant", "route", "buffer"]


_FRESH = (*FRESH_BUFFERS, aten.full_like.default, aten.new_full.default, aten.scalar_tensor.default)


def is_buffer(node: Node) -> bool:
    """A tensor whose entries depend on no other tensor's."""
    return node.target in _FRESH


@dataclass(frozen=True)
class Laid:
    """kind, and for each dim of the captured node whether it is a feature. node: the value in the
    body's graph: rows ``[N, *features]``, table ``[E, *features]``; None for the other kinds. met:
    the rows have met a table."""

    kind: Kind
    features: tuple[bool, ...]
    node: Node | None = None
    met: bool = False

    @property
    def at(self) -> list[int]:
        """Positions of the features."""
        return [dim for dim, feature in enumerate(self.features) if feature]


@dataclass
class Body:
    """graph: from placeholders ``rows``, ``ids``, ``offsets`` and ``operands`` to its one output.
    operands: placeholder -> the captured node it stands for, or the nodes of all experts, whose
    stack it stands for. tables: those that are per-expert. weighed: routing values multiply rows
    before an expert matmul."""

    graph: Graph
    rows: Node
    ids: Node
    offsets: Node
    operands: dict[Node, Node | tuple[Node, ...]] = field(default_factory=dict)
    tables: set[Node] = field(default_factory=set)
    weighed: bool = False

    def finish(self, result: Node) -> None:
        self.graph.output(result)
        self.graph.eliminate_dead_code()
        used = {n for n in self.graph.find_nodes(op="placeholder") if n.users}
        self.operands = {n: of for n, of in self.operands.items() if n in used}
        self.tables &= used

    def text(self) -> str:
        """The same for bodies that differ in names only."""
        return structure_of(self.graph)


class Layout:
    """tokens: views of one tensor, features last. route, parameters: whether a node holds routing
    values only, or parameters only. experts_of: a node of one expert's copy of the body -> the same
    of every expert, where they differ; copies: the same of nodes that may be every expert's
    (`copies.py`)."""

    def __init__(
        self,
        tokens: Sequence[Node],
        num_experts: int,
        route: Callable[[Node], bool],
        parameters: Callable[[Node], bool],
        experts_of: Mapping[Node, Node | tuple[Node, ...]],
        copies: Callable[[Sequence[Node]], Mapping[Node, Node | tuple[Node, ...]] | None],
    ) -> None:
        graph = Graph()
        rows, ids, offsets = (graph.placeholder(name) for name in ("rows", "ids", "offsets"))
        self.body = Body(graph, rows, ids, offsets)
        self.num_experts, self.route = num_experts, route
        self.parameters, self.experts_of, self._copies = parameters, dict(experts_of), copies
        self.laid: dict[Node, Laid] = {
            node: Laid("rows", (*[False] * (len(shape(node)) - 1), True), self.body.rows)
            for node in tokens
        }
        self._refused: dict[Node, Refusal] = {}
        self._joins: dict[Node, bool] = {}
        self._tables: dict[tuple[Any, ...], Node] = {}
        self.met: list[Node] = []

    def _inputs(self, node: Node) -> list[Node]:
        if node in self.experts_of or self.route(node) or is_buffer(node):
            return []
        if node.target is aten.cat.default and self._joins_experts(node):
            return [node.args[0][0]]  # type: ignore[index,list-item]
        return [] if self.parameters(node) and not self._varies(node) else tensor_inputs(node)

    def _joins_experts(self, node: Node) -> bool:
        """Whether ``node`` puts every expert's rows one behind the other."""
        parts: Any = node.args[0]
        if node not in self._joins:
            found = self._copies(parts) if len(parts) == self.num_experts > 1 else None
            self._joins[node] = found is not None
            self.experts_of |= found or {}
        return self._joins[node]

    def _varies(self, node: Node) -> bool:
        """Whether a node computed from parameters differs from expert to expert of a loop."""
        while self.experts_of and node.op == "call_function":
            if node in self.experts_of:
                return True
            sources = tensor_inputs(node)
            if len(sources) != 1:
                return any(map(self._varies, sources))
            node = sources[0]
        return node in self.experts_of

    # -- the body's graph ----------------------------------------------------------------------

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        def belongs(argument: Node) -> Node:
            if argument.graph is not self.body.graph:
                raise NotConstant(f"{op} takes {argument}, which is {_NOT_CONSTANT}", argument, 6)
            return argument

        map_arg((args, kwargs), belongs)
        return self.body.graph.call_function(op, args, kwargs)

    def _operand(self, stands_for: Node | tuple[Node, ...], name: str) -> Node:
        for known, of in self.body.operands.items():
            if of == stands_for:
                return known
        with self.body.graph.inserting_after(self.body.offsets):
            placeholder = self.body.graph.placeholder(name)
        self.body.operands[placeholder] = stands_for
        return placeholder

    def _features_of(self, node: Node, features: Sequence[bool]) -> list[int]:
        sizes = [s for s, feature in zip(shape(node), features, strict=True) if feature]
        if not all(isinstance(size, int) for size in sizes):
            raise NotConstant(f"{node} has a feature size that is {_NOT_CONSTANT}", node, 6)
        return sizes

    def table(self, node: Node, expert_dim: int, order: Sequence[int]) -> Node:
        """The table ``node`` with its experts in front and its other dims in ``order``."""
        if not same(shape(node)[expert_dim], self.num_experts):
            raise Refusal(
                f"{node} {list(shape(node))} is paired with experts along a dim that is not "
                f"the {self.num_experts} experts'",
                node,
                3,
            )
        placeholder = self._operand(node, node.name)
        self.body.tables.add(placeholder)
        return self._ordered(placeholder, [expert_dim, *order])

    def _ordered(self, node: Node, dims: list[int]) -> Node:
        if dims == sorted(dims):
            return node
        key = (node, *dims)
        if key not in self._tables:
            swapped = [at for at, dim in enumerate(dims) if at != dim]
            if len(swapped) == 2:
                self._tables[key] = self.call(aten.transpose.int, node, *swapped)
            else:
                self._tables[key] = self.call(aten.permute.default, node, dims)
        return self._tables[key]

    def reordered(self, laid: Laid, order: Sequence[int]) -> Laid:
        features = tuple(laid.features[dim] for dim in order)
        if laid.node is None:
            return Laid(laid.kind, features)
        place = {dim: at + 1 for at, dim in enumerate(laid.at)}
        dims = [0, *(place[dim] for dim in order if laid.features[dim])]
        return Laid(laid.kind, features, self._ordered(laid.node, dims), laid.met)

    def moved(self, node: Node, source: Laid, features: Sequence[bool]) -> Laid:
        """Rows that only changed places: the same rows to us."""
        return Laid(source.kind, tuple(features), source.node, source.met)

    def _per_row(self, table: Node) -> Node:
        return self.call(aten.index.Tensor, table, [self.body.ids])

    def _aligned(
        self, node: Node, operand: Node, laid: Laid, features: Sequence[bool], kind: Kind
    ) -> tuple[Node, bool]:
        """``operand`` as ``[N, *features of the result]``, a dim it lacks being 1."""
        rank, dims = len(features), shape(operand)
        lacking = rank - len(dims)
        wanted = [dims[at - lacking] if at >= lacking else 1 for at in range(rank) if features[at]]
        if laid.kind == "buffer":
            raise Refusal(f"{operand} takes part in a way not known", node, 3)
        if laid.kind == "constant":
            paired = [
                at
                for at, size in enumerate(dims)
                if not features[at + lacking] and not same(size, 1)
            ]
            if not paired:
                constant = self._operand(operand, operand.name)
                if len(wanted) == len(dims) or not dims:
                    return constant, False
                return self.call(aten.reshape.default, constant, wanted), False
            if len(paired) > 1:
                raise Refusal(f"{operand} varies from row to row in a way not known", node, 3)
            rest = [at for at in range(len(dims)) if at != paired[0]]
            table = self.table(operand, paired[0], rest)
            sizes = [self.num_experts, *wanted]
            table = self.call(aten.reshape.default, table, sizes)
            return (self._per_row(table) if kind == "rows" else table), True
        assert laid.node is not None
        met = laid.met
        have = self._features_of(operand, laid.features)
        result = laid.node
        if laid.kind == "table" and kind == "rows":
            result, met = self._per_row(result), True
        if have != wanted:
            lead = self.num_experts if laid.kind == kind == "table" else -1
            result = self.call(aten.reshape.default, result, [lead, *wanted])
        return result, met

    def _is_table(self, node: Node) -> bool:
        return any(
            of is node
            for placeholder, of in self.body.operands.items()
            if placeholder in self.body.tables
        )


class NotConstant(Refusal):
    """A size in the experts' body varies."""


_NOT_CONSTANT = (
    "not a constant, as when a second width of experts is compiled with dynamic shapes "
    "(dynamic=False compiles each by itself)"
)


def product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
