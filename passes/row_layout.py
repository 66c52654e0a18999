"""The experts' body in the layout of rows, whatever layout the model computes it in.

Contract. In: a node of the captured body (dense ``[E, T, F]``, gathered ``[T, K, F]``, places
``[E, C, F]``, one expert's rows ``[n, F]`` …), the tokens it is computed from, and which nodes hold
routing values only. Out: a graph of its own that computes the same from rows ``[N, H]`` sorted by
expert, their expert ids and the running sum of their counts; tables ``[E, …]`` meet them in
``grouped_mm``.

Every dim of a captured node is either a *feature* or one that *tells rows apart* (tokens, slots,
experts, places, in any order and grouping). Ops along features are copied; ops that only move rows
(repeat, gather, a one-hot matmul, a write into a buffer) vanish; a matmul that pairs the rows' and a
table's experts becomes a grouped one. Routing values that multiply rows are left out.

Pseudo-code::

    tokens -> rows;  a parameter [E, ...] -> a table once an op pairs its experts with rows
    lay(node) = the op's rule on its laid operands, or Refusal

What is *not* checked here is which row goes where and what it is weighted with: the result is a
hypothesis, to be proved by value (`hypothesis.py`). Rejects: ops that mix rows, matmuls of rows with
rows, sizes of features that are not constants.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_fx.compat import number, symbols
from moe_fx.passes.contraction import Contraction, contraction
from moe_fx.passes.extract import structure_of
from moe_fx.passes.feature_dims import DIM_OF, KEEPS_DIMS, TRAILING, regrouped
from moe_fx.passes.roles import (
    ELEMENTWISE_COPIES,
    FRESH_BUFFERS,
    VIEWS,
    Refusal,
    argument,
    is_grouped_matmul,
    is_pointwise,
    same,
    shape,
    tensor_inputs,
    value,
)

aten = torch.ops.aten
ops = torch.ops.moe_fx

_UNKNOWN = 10007  # a data-dependent number of rows: no other size is a multiple of it

Kind = Literal["rows", "table", "constant", "route", "buffer"]

_READS_BY_INDEX = {
    aten.index.Tensor: 1,
    aten.index_select.default: 2,
    aten.gather.default: 2,
    aten.embedding.default: 1,
}
_WRITES_BY_INDEX = {
    aten.index_copy.default: 3,
    aten.index_put.default: 2,
    aten.index_add.default: 3,
    aten.scatter.src: 3,
    aten.scatter_add.default: 3,
}
_MOVES = (
    aten.expand.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.expand_as.default,
)
_MASKS = (
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
)
_PADS = (aten.pad.default, aten.constant_pad_nd.default)
_PERMUTES = (aten.transpose.int, aten.permute.default)
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


class RowLayout:
    """tokens: views of one tensor, features last. route, parameters: whether a node holds routing
    values only, or parameters only.
    experts_of: a node of one expert's copy of the body -> the same of every expert, where they
    differ; copies: the same of nodes that may be every expert's (`copies.py`)."""

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
        self.body = Body(graph, *(graph.placeholder(name) for name in ("rows", "ids", "offsets")))
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

    def lay(self, node: Node) -> Laid:
        """Iterative, since bodies may be long."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._refused:
                raise self._refused[current]
            missing = [n for n in self._inputs(current) if n not in self.laid]
            if current in self.laid or not missing:
                stack.pop()
                if current not in self.laid:
                    self.laid[current] = self._try(current)
            else:
                stack += missing
        return self.laid[node]

    def _try(self, node: Node) -> Laid:
        try:
            return self._lay(node)
        except Refusal as refusal:
            self._refused[node] = refusal
            raise

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

    def _lay(self, node: Node) -> Laid:
        rank = len(shape(node))
        if self.route(node):
            return Laid("route", (False,) * rank)
        if node in self.experts_of:
            table = self._operand(self.experts_of[node], node.name)
            self.body.tables.add(table)
            return Laid("table", (True,) * rank, table)
        if is_buffer(node):
            return Laid("buffer", (False,) * rank)
        if self.parameters(node) and not self._varies(node):
            return Laid("constant", (True,) * rank)
        if node.op != "call_function":
            raise Refusal(f"{node} is not computed from the tokens", node, 3)
        return self._rule(node)

    def _rule(self, node: Node) -> Laid:
        if node.target is operator.getitem:
            return self._item(node)
        if is_grouped_matmul(node):
            return self._grouped(node)
        found = contraction(node)
        if found is not None:
            return self._contract(node, found)
        for targets, rule in _RULES:
            if node.target in targets:
                return rule(self, node)
        if is_pointwise(node) or node.target in ELEMENTWISE_COPIES:
            return self._pointwise(node)
        if node.target in DIM_OF or node.target in TRAILING:
            return self._along(node)
        raise Refusal(f"{node.target} is not known to keep rows apart", node, 3)

    # -- the body's graph ----------------------------------------------------------------------

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
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
            raise Refusal(f"{node} has a feature size that is not a constant", node, 3)
        return sizes

    def table(self, node: Node, expert_dim: int, order: Sequence[int]) -> Node:
        """The table ``node`` with its experts in front and its other dims in ``order``."""
        if not same(shape(node)[expert_dim], self.num_experts):
            raise Refusal(
                f"{node} {list(shape(node))} is paired with experts along a dim that does not count "
                f"the {self.num_experts} experts",
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

    def _per_row(self, table: Node) -> Node:
        return self.call(aten.index.Tensor, table, [self.body.ids])

    # -- rules ---------------------------------------------------------------------------------

    def _item(self, node: Node) -> Laid:
        source: Any = node.args[0]
        laid = self.laid[source]
        if source.target in _SPLITS and not _along_feature(self, source):
            rank = len(shape(node))
            dropped = source.target is aten.unbind.int
            return self._moved(node, laid, _trailing(laid, rank) if dropped else laid.features)
        if laid.node is None:
            return Laid(laid.kind, (False,) * len(shape(node)))
        item = self.call(operator.getitem, laid.node, node.args[1])
        features = laid.features
        if source.target is aten.unbind.int:
            dim = argument(source, 1, "dim", 0) % len(features)
            features = features[:dim] + features[dim + 1 :]
        return Laid(laid.kind, features, item, laid.met)

    def _moved(self, node: Node, source: Laid, features: Sequence[bool]) -> Laid:
        """Rows that only changed places: the same rows to us."""
        return Laid(source.kind, tuple(features), source.node, source.met)

    def _view(self, node: Node) -> Laid:
        source: Any = node.args[0]
        laid = self.laid[source]
        known = symbols([*shape(source), *shape(node)], _UNKNOWN)
        before = [number(size, known) for size in shape(source)]
        after = [number(size, known) for size in shape(node)]
        features = regrouped(before, laid.features, after)
        if features is None:
            raise Refusal(f"the reshape to {list(shape(node))} mixes rows and features", node, 3)
        if laid.node is None:
            return Laid(laid.kind, features)
        sizes = self._features_of(node, features)
        if sizes == self._features_of(source, laid.features):
            return self._moved(node, laid, features)
        return Laid(
            laid.kind, features, self.call(aten.reshape.default, laid.node, [-1, *sizes]), laid.met
        )

    def _permuted(self, node: Node) -> Laid:
        source: Any = node.args[0]
        laid, rank = self.laid[source], len(shape(source))
        if node.target is aten.permute.default:
            order = [dim % rank for dim in argument(node, 1, "dims")]
        else:
            order = list(range(rank))
            one, other = (argument(node, at, f"dim{at - 1}") % rank for at in (1, 2))
            order[one], order[other] = other, one
        return self._reordered(laid, order)

    def _reordered(self, laid: Laid, order: Sequence[int]) -> Laid:
        features = tuple(laid.features[dim] for dim in order)
        if laid.node is None:
            return Laid(laid.kind, features)
        place = {dim: at + 1 for at, dim in enumerate(laid.at)}
        dims = [0, *(place[dim] for dim in order if laid.features[dim])]
        return Laid(laid.kind, features, self._ordered(laid.node, dims), laid.met)

    def _unsqueezed(self, node: Node) -> Laid:
        laid = self.laid[node.args[0]]  # type: ignore[index]
        dim = argument(node, 1, "dim") % len(shape(node))
        features = (*laid.features[:dim], False, *laid.features[dim:])
        if laid.kind == "table":
            return self._new_feature(node, laid, features, dim)
        return self._moved(node, laid, features)

    def _new_feature(self, node: Node, laid: Laid, features: Sequence[bool], dim: int) -> Laid:
        """A dim of a table of one expert: all its dims are features."""
        features = tuple(at == dim or feature for at, feature in enumerate(features))
        sizes = self._features_of(node, features)
        reshaped = self.call(aten.reshape.default, laid.node, [self.num_experts, *sizes])
        return Laid(laid.kind, features, reshaped, laid.met)

    def _squeezed(self, node: Node) -> Laid:
        laid = self.laid[node.args[0]]  # type: ignore[index]
        dim = argument(node, 1, "dim") % len(laid.features)
        if len(shape(node)) == len(laid.features):
            return laid
        features = laid.features[:dim] + laid.features[dim + 1 :]
        if not laid.features[dim] or laid.node is None:
            return self._moved(node, laid, features)
        at = laid.at.index(dim) + 1
        return Laid(laid.kind, features, self.call(aten.squeeze.dim, laid.node, at), laid.met)

    def _moving(self, node: Node) -> Laid:
        """Repeats of rows: along features nothing may change."""
        source: Any = node.args[0]
        laid, rank = self.laid[source], len(shape(node))
        features = (*[False] * (rank - len(laid.features)), *laid.features)
        if self._features_of(node, features) != self._features_of(source, laid.features):
            raise Refusal(f"{node.target} repeats along features", node, 3)
        if node.target is aten.repeat_interleave.self_int and argument(node, 2, "dim") is None:
            raise Refusal("repeat_interleave without a dim flattens rows and features", node, 3)
        return self._moved(node, laid, features)

    def _read(self, node: Node) -> Laid:
        """By index: rows change places; a table is looked up for each row."""
        source: Any = node.args[0]
        laid = self.laid[source]
        index: Any = node.args[_READS_BY_INDEX[node.target]]
        indices = [i for i in (index if isinstance(index, (list, tuple)) else [index]) if i]
        if any(self.laid[i].kind not in ("route", "buffer") for i in indices):
            raise Refusal("rows are indexed by something that is not routing", node, 3)
        rank = len(shape(node))
        if laid.kind == "constant":
            if node.target is aten.gather.default or (
                isinstance(index, (list, tuple)) and len(index) != 1
            ):
                raise Refusal(f"{source} is looked up in a way not known", node, 3)
            dims = list(range(1, len(shape(source))))
            looked_up = rank - len(dims)
            features = (*[False] * looked_up, *[True] * len(dims))
            return Laid("table", features, self.table(source, 0, dims))
        if node.target is aten.gather.default:
            return self._moved(node, laid, laid.features)
        return self._moved(node, laid, _trailing(laid, rank, node))

    def _written(self, node: Node) -> Laid:
        buffer: Any = node.args[0]
        if self.laid[buffer].kind not in ("buffer", "rows"):
            raise Refusal("rows are written into something that is not empty", node, 3)
        laid = self.laid[node.args[_WRITES_BY_INDEX[node.target]]]  # type: ignore[index]
        return self._moved(node, laid, _trailing(laid, len(shape(node)), node))

    def _masked(self, node: Node) -> Laid:
        kinds = [self.laid[n] for n in tensor_inputs(node)]
        rows = [laid for laid in kinds if laid.kind in ("rows", "table")]
        others = {laid.kind for laid in kinds if laid not in rows}
        if len(rows) == 1 and others <= {"route", "buffer"} and others:
            self.body.weighed |= not rows[0].met
            return self._moved(node, rows[0], _trailing(rows[0], len(shape(node)), node))
        return self._pointwise(node)

    def _padded(self, node: Node) -> Laid:
        laid = self.laid[node.args[0]]  # type: ignore[index]
        pads: Any = node.args[1]
        for at in range(0, len(pads), 2):
            if (pads[at] or pads[at + 1]) and laid.features[-1 - at // 2]:
                raise Refusal("features are padded", node, 3)
        return self._moved(node, laid, laid.features)

    def _along(self, node: Node) -> Laid:
        """An op along some dims: along features it is copied; along the others it may only pick
        or split rows."""
        source: Any = node.args[0]
        laid = self.laid[source]
        if laid.node is None and laid.kind in ("route", "buffer"):
            return Laid(laid.kind, (False,) * len(shape(node)))
        if node.target in TRAILING:
            return self._trailing_op(node, laid)
        position, name, default = DIM_OF[node.target]
        given = argument(node, position, name, default)
        rank = len(laid.features)
        many = given if isinstance(given, (list, tuple)) else [given]
        dims = list(range(rank)) if given is None else [dim % rank for dim in many]
        if not any(laid.features[dim] for dim in dims):
            if node.target in _PICKS:
                dropped = node.target is aten.select.int
                left = [f for dim, f in enumerate(laid.features) if not (dropped and dim in dims)]
                return self._moved(node, laid, left)
            raise Refusal(f"{node.target} works across rows", node, 3)
        if not all(laid.features[dim] for dim in dims):
            raise Refusal(f"{node.target} works across rows and features", node, 3)
        places = [laid.at.index(dim) + 1 for dim in dims]
        args = list(node.args)
        kwargs = dict(node.kwargs)
        moved: Any = places if given is None or isinstance(given, (list, tuple)) else places[0]
        if len(args) > position:
            args[position] = moved
        else:
            kwargs[name] = moved
        args[0] = laid.node
        features = laid.features
        if node.target not in KEEPS_DIMS and not argument(node, 2, "keepdim", False):
            features = tuple(f for dim, f in enumerate(laid.features) if dim not in dims)
        if node.target is aten.select.int:
            features = tuple(f for dim, f in enumerate(laid.features) if dim not in dims)
        return Laid(laid.kind, features, self.call(node.target, *args, **kwargs), laid.met)

    def _trailing_op(self, node: Node, laid: Laid) -> Laid:
        sizes: Any = argument(node, TRAILING[node.target], "normalized_shape")
        if not all(laid.features[-len(sizes) :]):
            raise Refusal(f"{node.target} works across rows", node, 3)
        return Laid(laid.kind, laid.features, self._copied(node), laid.met)

    def _copied(self, node: Node) -> Node:
        def own(n: Node) -> Any:
            laid = self.laid.get(n)
            if laid is None or laid.kind == "constant":
                return self._operand(n, n.name)
            if laid.node is None:
                raise Refusal(f"{n} takes part in a way not known", node, 3)
            return laid.node

        return self.call(node.target, *map_arg(node.args, own), **map_arg(node.kwargs, own))

    def _concatenated(self, node: Node) -> Laid:
        parts: Any = node.args[0]
        if self._joins_experts(node):
            return self._moved(node, self.laid[parts[0]], self.laid[parts[0]].features)
        laid = [self.laid[n] for n in parts]
        first, dim = laid[0], argument(node, 1, "dim", 0) % len(shape(node))
        alike = all((p.kind, p.features) == (first.kind, first.features) for p in laid)
        if not alike or first.node is None or not first.features[dim]:
            raise Refusal("rows are concatenated", node, 3)
        joined = self.call(aten.cat.default, [p.node for p in laid], first.at.index(dim) + 1)
        return Laid(first.kind, first.features, joined, any(p.met for p in laid))

    def _pointwise(self, node: Node) -> Laid:
        """Operands are aligned at the right, as they are broadcast."""
        rank = len(shape(node))
        laid = {n: self.laid[n] for n in tensor_inputs(node)}
        main = [x for x in laid.values() if x.node is not None]
        if not main:
            return Laid("route", (False,) * rank)
        features = [False] * rank
        for n, x in laid.items():
            if x.node is None:
                continue
            for dim, feature in enumerate(x.features):
                at = rank - len(x.features) + dim
                features[at] |= feature and (not same(shape(n)[dim], 1) or same(shape(node)[at], 1))
        kind: Kind = "rows" if any(x.kind == "rows" for x in main) else "table"
        met = any(x.met for x in main)
        own: dict[Node, Any] = {}
        for n, x in laid.items():
            if x.kind == "route":
                self._leave_out(node, n, features)
                self.body.weighed |= kind == "rows" and not met
            else:
                own[n], now_met = self._aligned(node, n, x, features, kind)
                met |= now_met
        if len(own) < len(laid):
            if len(own) != 1:
                raise Refusal("routing values take part in more than a product", node, 3)
            return Laid(kind, tuple(features), next(iter(own.values())), met)
        copy = self.call(
            node.target,
            *map_arg(node.args, own.__getitem__),
            **map_arg(node.kwargs, own.__getitem__),
        )
        if any(x.kind in ("table", "constant") for x in laid.values()) and met and kind == "rows":
            self._note_meeting(node, laid)
        return Laid(kind, tuple(features), copy, met)

    def _note_meeting(self, node: Node, laid: Mapping[Node, Laid]) -> None:
        for n, x in laid.items():
            if x.kind == "table" or (x.kind == "constant" and self._is_table(n)):
                self.met.append(node)
                return

    def _is_table(self, node: Node) -> bool:
        return any(
            of is node for placeholder, of in self.body.operands.items() if placeholder in self.body.tables
        )

    def _leave_out(self, node: Node, route: Node, features: Sequence[bool]) -> None:
        dims = shape(route)
        if node.target not in (aten.mul.Tensor, aten.div.Tensor):
            raise Refusal(f"routing values take part in {node.target}", node, 3)
        if any(features[len(features) - len(dims) + at] and not same(size, 1) for at, size in enumerate(dims)):
            raise Refusal("routing values differ between the features of a row", node, 3)

    def _aligned(
        self, node: Node, operand: Node, laid: Laid, features: Sequence[bool], kind: Kind
    ) -> tuple[Node, bool]:
        """``operand`` as ``[N, *features of the result]``, a dim it lacks being 1."""
        rank, dims = len(features), shape(operand)
        lacking = rank - len(dims)
        wanted = [
            dims[at - lacking] if at >= lacking else 1 for at in range(rank) if features[at]
        ]
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

    # -- matmuls -------------------------------------------------------------------------------

    def _grouped(self, node: Node) -> Laid:
        rows, table = (self.laid[n] for n in node.args[:2])  # type: ignore[index]
        if rows.kind != "rows" or self.laid[node.args[2]].kind != "route":  # type: ignore[index]
            raise Refusal("the grouped matmul's rows are not the dispatched tokens", node, 3)
        if table.kind != "constant":
            raise Refusal("the grouped matmul's weight is not one matrix per expert", node, 3)
        weight = self.table(node.args[1], 0, [1, 2])  # type: ignore[arg-type]
        self.met.append(node)
        product = self.call(ops.grouped_mm.default, rows.node, weight, self.body.offsets)
        return Laid("rows", rows.features, product, True)

    def _contract(self, node: Node, found: Contraction) -> Laid:
        laid = [self.laid[n] for n in found.operands]
        kinds = [x.kind for x in laid]
        if "rows" in kinds and kinds.count("rows") == 1:
            at = kinds.index("rows")
            if kinds[1 - at] == "route":
                return self._dispatched(node, found, at, laid)
            result = self._multiplied(node, found, at, laid)
        elif "route" in kinds and "constant" in kinds:
            return self._picked(node, found, kinds.index("constant"))
        else:
            raise Refusal(f"{node.target} of {' and '.join(kinds)}", node, 3)
        if found.bias is not None:
            result = self._biased(node, found.bias, result)
        return result

    def _dispatched(self, node: Node, found: Contraction, at: int, laid: Sequence[Laid]) -> Laid:
        """Rows times routing values: summed along rows, rows go to their places."""
        rows, letters = laid[at], found.letters[at]
        feature = {x for x, is_feature in zip(letters, rows.features, strict=True) if is_feature}
        if feature & set(found.letters[1 - at]) or not feature <= set(found.out):
            raise Refusal("routing values differ between the features of a row", node, 3)
        if rows.met:
            raise Refusal("the experts' rows are summed", node, 4)
        order = [letters.index(x) for x in found.out if x in feature]
        reordered = self._reordered(rows, [*(d for d in range(len(letters)) if not rows.features[d]), *order])
        return Laid("rows", tuple(x in feature for x in found.out), reordered.node, rows.met)

    def _picked(self, node: Node, found: Contraction, at: int) -> Laid:
        """A table times one-hot ids: each row's own entry."""
        table, letters = found.operands[at], found.letters[at]
        summed = [x for x in letters if x in found.letters[1 - at] and x not in found.out]
        if len(summed) != 1 or set(letters) & set(found.letters[1 - at]) != set(summed):
            raise Refusal(f"{table} is multiplied by routing values in a way not known", node, 3)
        order = [letters.index(x) for x in found.out if x in letters]
        features = tuple(x in letters for x in found.out)
        return Laid("table", features, self.table(table, letters.index(summed[0]), order))

    def _multiplied(self, node: Node, found: Contraction, at: int, laid: Sequence[Laid]) -> Laid:
        rows, other = laid[at], laid[1 - at]
        letters, theirs = found.letters[at], found.letters[1 - at]
        feature = [x for x, is_feature in zip(letters, rows.features, strict=True) if is_feature]
        summed = [x for x in feature if x in theirs and x not in found.out]
        if any(x not in found.out and x not in summed for x in {*letters, *theirs}):
            raise Refusal("the matmul sums over rows", node, 3)
        if summed != feature:
            raise Refusal("the matmul sums over a part of a row's features", node, 3)
        if other.kind == "buffer":
            raise Refusal("rows are multiplied by an empty buffer", node, 3)
        assert rows.node is not None
        operand = found.operands[1 - at]
        size_of = dict(zip(theirs, shape(operand), strict=True))
        new = [x for x in found.out if x in theirs and x not in letters]
        if other.kind == "constant":
            expert = self._expert_letter(theirs, letters, rows, size_of, new)
            if expert is None:
                return self._shared(node, found, at, rows, feature)
            new = [x for x in new if x != expert]
            order = [theirs.index(x) for x in (*summed, *new)]
            table = self.table(operand, theirs.index(expert), order)
        else:
            expert = None
            outs = [x for x, is_feature in zip(theirs, other.features, strict=True) if is_feature]
            new = [x for x in new if x in outs]
            if sorted(outs) != sorted([*summed, *new]):
                raise Refusal("a table's features meet rows in a way not known", node, 3)
            assert other.node is not None
            table = self._ordered(other.node, [0, *(outs.index(x) + 1 for x in (*summed, *new))])
        self.met.append(node)
        out_sizes = [size_of[x] for x in new]
        result = self._grouped_product(rows, table, [size_of[x] for x in summed], out_sizes)
        return Laid("rows", tuple(x in new for x in found.out), result, True)

    def _grouped_product(
        self, rows: Laid, table: Node, summed: list[int], out: list[int]
    ) -> Node:
        left: Any = rows.node
        if len(summed) != 1 or len(out) != 1:
            flat = [self.num_experts, _product(summed), _product(out)]
            table = self.call(aten.reshape.default, table, flat)
            left = self.call(aten.reshape.default, left, [-1, _product(summed)])
        result = self.call(ops.grouped_mm.default, left, table, self.body.offsets)
        if len(out) != 1:
            result = self.call(aten.reshape.default, result, [-1, *out])
        return result

    def _expert_letter(
        self, theirs: str, letters: str, rows: Laid, size_of: Mapping[str, Any], new: Sequence[str]
    ) -> str | None:
        """The letter that counts experts in a parameter that rows meet: one they have in common
        that tells rows apart, or a new one of that size; None: no experts."""
        shared = [
            x
            for x, is_feature in zip(letters, rows.features, strict=True)
            if not is_feature and x in theirs
        ]
        if shared:
            return shared[0] if len(shared) == 1 else None
        if len(theirs) < 3:
            return None
        fitting = [x for x in theirs if x in new and same(size_of[x], self.num_experts)]
        return fitting[0] if fitting and len(new) > 1 else None

    def _shared(
        self, node: Node, found: Contraction, at: int, rows: Laid, feature: Sequence[str]
    ) -> Laid:
        """A matrix that all experts share."""
        theirs = found.letters[1 - at]
        out = [x for x in found.out if x in theirs or x in feature]
        operand = self._operand(found.operands[1 - at], found.operands[1 - at].name)
        equation = f"N{''.join(feature)},{theirs}->N{''.join(out)}"
        product = self.call(aten.einsum.default, equation, [rows.node, operand])
        return Laid("rows", tuple(x in theirs for x in found.out), product, rows.met)

    def _biased(self, node: Node, bias: Node, result: Laid) -> Laid:
        laid = self.laid[bias]
        if laid.kind not in ("table", "constant"):
            raise Refusal("a matmul adds something that is no bias", node, 3)
        added, met = self._aligned(node, bias, laid, result.features, "rows")
        total = self.call(aten.add.Tensor, result.node, added)
        return Laid("rows", result.features, total, result.met or met)


_SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
)
_PICKS = (*_SPLITS, aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.flip.default)


def _along_feature(layout: RowLayout, split: Node) -> bool:
    position, name, default = DIM_OF[split.target]
    source: Any = split.args[0]
    features = layout.laid[source].features
    return bool(features) and features[argument(split, position, name, default) % len(features)]


def _trailing(laid: Laid, rank: int, node: Node | None = None) -> tuple[bool, ...]:
    """The features stay last, whatever became of the dims before them."""
    count = len(laid.at)
    if node is not None and any(laid.features[: len(laid.features) - count]):
        raise Refusal("rows are indexed with their features not last", node, 3)
    return (*[False] * (rank - count), *[True] * count)


def _product(sizes: Sequence[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total


_RULES: tuple[tuple[Collection[Any], Callable[[RowLayout, Node], Laid]], ...] = (
    ((*VIEWS, aten.flatten.using_ints, aten.unflatten.int), RowLayout._view),
    (_PERMUTES, RowLayout._permuted),
    ((aten.unsqueeze.default,), RowLayout._unsqueezed),
    ((aten.squeeze.dim,), RowLayout._squeezed),
    (_MOVES, RowLayout._moving),
    (_READS_BY_INDEX, RowLayout._read),
    (_WRITES_BY_INDEX, RowLayout._written),
    (_MASKS, RowLayout._masked),
    (_PADS, RowLayout._padded),
    ((aten.cat.default,), RowLayout._concatenated),
)
