"""What a rewritten region is made of on the experts' side: their body on rows sorted by expert.

`Emitter.experts` emits the captured body on rows of a slice of the local experts: ops on rows as
captured, matmuls with per-expert tables as ``grouped_mm``, permutations left out (rows on this side
stand in one order). Tables are cut to the slice: the shard of a gathered table, a view of a
replicated one, the matrices themselves where a table is a stack of separate ones; a table that is
computed from such is computed from the slice's (`lineage.py`). Casts at either end of the body may
be left to the tokens' side (`narrow.py`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_fx.graph.lineage import Lineage, entry_of, trace
from moe_fx.graph.nodes import VIEWS, is_grouped_matmul, shape, value
from moe_fx.graph.per_expert import cut_call
from moe_fx.passes.roles import PairIds, Rows, RowTable
from moe_fx.passes.strategies.narrow import Narrow, is_permuting, narrow
from moe_fx.plan import ExchangePlan
from moe_fx.region import Parts

aten = torch.ops.aten
ops = torch.ops.moe_fx

_EXCHANGES = (
    ops.exchange_counts.default,
    ops.all_to_all.default,
    ops.wait.default,
    ops.even_sizes.default,
    ops.distribute.default,
    ops.collect.default,
    ops.direct_dispatch.default,
    ops.direct_combine.default,
    ops.direct_experts.default,
)
_SENDS_ROWS = ("alltoall", "padded_alltoall")


class Emitter:
    """Adds nodes where the graph's insertion point is."""

    def __init__(
        self,
        graph: Graph,
        parts: Parts,
        plan: ExchangePlan,
        waiting: Mapping[str, Any] | None = None,
    ) -> None:
        """waiting: ``layer`` and ``exchange_timeout`` of its exchanges (`moe_fx.ranks.waiting`)."""
        self.graph, self.parts, self.plan = graph, parts, plan
        self.waiting = waiting or {}
        self.trace = parts.combined.meta.get("stack_trace", "")
        self._narrow = narrow(parts) if plan.strategy in _SENDS_ROWS else Narrow()
        self._owned: dict[Node, Node] = {}
        self._splits: dict[Node, Node] = {}

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        if op in _EXCHANGES:
            kwargs |= self.waiting
        node = self.graph.call_function(op, args, kwargs)
        node.meta["stack_trace"] = self.trace
        if "custom" in self.parts.combined.meta:  # the body it is of (`moe_fx.capture.bodies`)
            node.meta["custom"] = self.parts.combined.meta["custom"]
        return node

    def item(self, node: Node, index: int) -> Node:
        return self.call(operator.getitem, node, index)

    def copy(self, node: Node, translate: Callable[[Node], Any]) -> Node:
        copy = self.call(
            node.target,  # type: ignore[arg-type]
            *map_arg(node.args, translate),
            **map_arg(node.kwargs, translate),
        )
        copy.meta["stack_trace"] = node.meta.get("stack_trace", self.trace)
        return copy

    def experts(self, rows: Node, counts: Node, at: int = 0, fill: float | None = None) -> Node:
        """The experts' results for ``rows``, sorted by expert, ``counts`` of each expert of slice
        ``at`` of the local ones. fill: there are more rows, which are nobody's; about this share
        is somebody's."""
        return _Experts(self, rows, counts, at, fill).result()

    def leaving(self, rows: Node) -> Node:
        """``rows`` in the dtype in which they travel to experts."""
        casts = self._narrow.casts
        return self.copy(casts[0], lambda _: rows) if casts else rows

    def back(self, rows: Node) -> Node:
        """Experts' results that have come back, in the dtype of ``parts.cut``."""
        widens = self._narrow.widens
        return rows if widens is None else self.copy(widens, lambda _: rows)

    def is_done_where_tokens_are(self, node: Node) -> bool:
        return node in self._narrow.casts or node is self._narrow.widens

    def owned(self, table: Node) -> Node:
        """``[E, ...] -> [E/W, ...]``: what this rank's experts have of ``table``, made of what they
        have of its sources (`lineage.py`). Where no token travels every expert is local: gathers
        over one rank are left out, all else is as captured."""
        if table not in self._owned:
            self._owned[table] = self._own(table)
        return self._owned[table]

    def members(self, table: Node, experts: range) -> list[Node]:
        """Of those that ``table`` stacks, these; zeros for numbers behind the last."""
        stacked, found = self.lineage.stacks[table], []
        for expert in experts:
            if expert < len(stacked):
                found.append(self.member(stacked[expert], expert))
            else:
                found.append(self._zeros(stacked[0]))
        return found

    def _zeros(self, like: Node) -> Node:
        """Reads nothing of ``like``, which another rank may have to gather."""
        val = value(like)
        sizes = list(val.shape)
        return self.call(aten.new_zeros.default, self.parts.tokens, sizes, dtype=val.dtype)

    def member(self, node: Node, expert: int) -> Node:
        """``node``, which is of one local expert only, made of what this rank has."""
        if node not in self.lineage.members or self.plan.strategy == "gather_weights":
            return node
        if node not in self._owned:
            self._owned[node] = self._member(node, expert)
        return self._owned[node]

    def piece(self, owned: Node, at: int) -> Node:
        """Slice ``at`` of the local experts; one split for all slices, so that there is one
        gradient."""
        if self.plan.expert_slices == 1:
            return owned
        if owned not in self._splits:
            count = self.plan.experts_per_slice
            self._splits[owned] = self.call(aten.split.Tensor, owned, count)
        return self.item(self._splits[owned], at)

    @cached_property
    def lineage(self) -> Lineage:
        return trace(self.parts.tables, self.plan.num_experts)

    def _own(self, table: Node) -> Node:
        """With rows for all of ``plan.local_experts``; what this rank has not is 0."""
        lineage, plan = self.lineage, self.plan
        if plan.strategy == "gather_weights":
            return table
        if table in lineage.gathers:
            return lineage.gathers[table].shard
        kept, here = plan.local_experts, plan.experts
        if table in lineage.stacks:
            own = self.members(table, range(plan.first_expert, plan.first_expert + kept))
            if own == list(lineage.stacks[table]):
                return table
            return self.call(table.target, own)  # type: ignore[arg-type]
        if table in lineage.steps:
            own_of = {source: self.owned(source) for source in lineage.steps[table]}
            if all(source is own for source, own in own_of.items()) and not plan.exchanges:
                return table
            call = cut_call(table, plan.num_experts, kept)
            op, args, kwargs = map_arg(call, lambda n: own_of.get(n, n))
            cut = self.call(op, *args, **kwargs)
            cut.meta["stack_trace"] = table.meta.get("stack_trace", self.trace)
            return cut
        if not plan.exchanges:
            return table
        block = shape(table)[0] // plan.num_experts
        rows = self.call(aten.slice.Tensor, table, 0, here.start * block, here.stop * block)
        if len(here) == kept:
            return rows
        padding = [0] * (2 * len(shape(table)) - 1) + [(kept - len(here)) * block]
        return self.call(aten.constant_pad_nd.default, rows, padding)

    def _member(self, node: Node, expert: int) -> Node:
        entry = entry_of(node, self.plan.num_experts)
        if entry is None:
            return self.copy(node, lambda n: self.member(n, expert))
        own, at = self.owned(entry.source), expert - self.plan.first_expert
        if entry.rows is None:
            return self.call(aten.select.int, own, 0, at)
        return self.call(aten.slice.Tensor, own, 0, at * entry.rows, (at + 1) * entry.rows)


def weighed(emitter: Emitter, rows: Node, factor: Node) -> Node:
    """Rows of tokens times their routing weights, in the tokens' dtype."""
    product = emitter.call(aten.mul.Tensor, rows, factor)
    dtype = value(emitter.parts.tokens).dtype
    return emitter.call(aten._to_copy.default, product, dtype=dtype)


@dataclass
class _Experts:
    """One run of the body. at: the slice of the local experts whose rows these are."""

    emitter: Emitter
    rows: Node
    counts: Node
    at: int
    fill: float | None

    def __post_init__(self) -> None:
        self.parts, self.plan = self.emitter.parts, self.emitter.plan
        self.call, self.copy = self.emitter.call, self.emitter.copy
        self.num_rows = self.call(aten.sym_size.int, self.rows, 0)
        self.offsets = self.call(aten.cumsum.default, self.counts, 0, dtype=torch.int32)
        self.values: dict[Node, Node] = dict.fromkeys(self.parts.dispatched, self.rows)
        self.tables: dict[Node, Node] = {}
        self.row_ids: Node | None = None

    def result(self) -> Node:
        for node in self.parts.body:
            if node not in self.values and isinstance(self.parts.roles[node], Rows):
                self.values[node] = self._node(node)
        return self.values[self.parts.cut]

    def _node(self, node: Node) -> Node:
        roles = self.parts.roles
        if is_permuting(self.parts, node) or self.emitter.is_done_where_tokens_are(node):
            source = node.args[0]
            assert isinstance(source, Node)
            return self.values[source]
        if is_grouped_matmul(node):
            rows, table, _ = node.args
            return self._grouped_mm(self._rows(rows), table)
        if node.target is aten.bmm.default and any(
            isinstance(roles.get(n), RowTable) for n in node.all_input_nodes
        ):
            return self._per_row_matmul(node)
        if node.target in VIEWS:
            return self.call(
                aten.reshape.default, self._rows(node.args[0]), [self.num_rows, *shape(node)[1:]]
            )
        return self.copy(node, self._rows)

    def _per_row_matmul(self, node: Node) -> Node:
        """``bmm`` of each row with its own copy of its expert's matrix, in either order."""
        left, right = node.all_input_nodes
        table_first = isinstance(self.parts.roles.get(left), RowTable)
        rows, table = (right, left) if table_first else (left, right)
        vector_dim = 2 if table_first else 1
        weight = self._table(table)
        if table_first:
            weight = self.call(aten.transpose.int, weight, 1, 2)
        flat = self.call(aten.squeeze.dim, self._rows(rows), vector_dim)
        product = self._multiply(ops.grouped_mm.default, flat, weight)
        return self.call(aten.unsqueeze.default, product, vector_dim)

    def _grouped_mm(self, rows: Node, table: Any) -> Node:
        separate = self._separate(table)
        if separate is not None:
            return self._multiply(ops.grouped_mm_list.default, rows, separate)
        return self._multiply(ops.grouped_mm.default, rows, self._local(table))

    def _multiply(self, op: Callable[..., Any], rows: Node, weights: Any) -> Node:
        return self.call(op, rows, weights, self.offsets, self.fill)

    def _separate(self, table: Node) -> list[Node] | None:
        """The slice's matrices behind a table that is a stack of them, so that no copy is made."""
        if self._is_stack(table):
            return self._stacked(table)
        if table.target is not aten.transpose.int:
            return None
        source, *dims = table.args
        assert isinstance(source, Node)
        matrices = self._separate(source)
        if matrices is None or set(dims) != {1, 2}:
            return None
        return [self.call(aten.transpose.int, matrix, 0, 1) for matrix in matrices]

    def _is_stack(self, table: Node) -> bool:
        return table.target is aten.stack.default and table in self.emitter.lineage.stacks

    def _stacked(self, table: Node) -> list[Node]:
        count = self.plan.experts_per_slice
        first = self.plan.first_expert + self.at * count
        return self.emitter.members(table, range(first, first + count))

    def _rows(self, node: Any) -> Any:
        """The value on this side of a node the captured body reads."""
        role = self.parts.roles.get(node)
        if isinstance(role, RowTable):
            return self.call(aten.index.Tensor, self._table(node), [self._ids()])
        return self.values.get(node, node)

    def _ids(self) -> Node:
        if self.row_ids is None:
            self.row_ids = self.call(ops.row_experts.default, self.counts, self.num_rows)
        return self.row_ids

    def _table(self, node: Any) -> Node:
        """The slice's table behind rows gathered from it, with whatever was done to each row since
        done to each expert instead."""
        if node in self.tables:
            return self.tables[node]
        index = next((n for n in node.all_input_nodes if self._is_pair_ids(n)), None)
        if index is not None:
            source = next(n for n in node.all_input_nodes if n is not index)
            table = self._local(source)
        elif is_permuting(self.parts, node):
            table = self._table(node.args[0])
        elif node.target in VIEWS:
            sizes = [self.plan.experts_per_slice, *shape(node)[1:]]
            table = self.call(aten.reshape.default, self._table(node.args[0]), sizes)
        else:
            table = self.copy(node, self._table_or_constant)
        self.tables[node] = table
        return table

    def _table_or_constant(self, node: Node) -> Node:
        return self._table(node) if isinstance(self.parts.roles.get(node), RowTable) else node

    def _is_pair_ids(self, node: Node) -> bool:
        return isinstance(self.parts.roles.get(node), PairIds)

    def _local(self, table: Any) -> Node:
        if self._is_stack(table):
            return self.call(aten.stack.default, self._stacked(table))
        return self.emitter.piece(self.emitter.owned(table), self.at)
