"""Rewrite: region -> dialect ops.

Contract. In: verified regions and their plans. Out: a graph in which each region's result comes
from dialect ops; the region's own nodes are gone unless something else reads them.

Pseudo-code, for one region (in parentheses: only if the plan exchanges)::

    counts = expert_counts(ids);  rows, row_map = permute(tokens, ids)
    (recv = exchange_counts(counts);  sizes = split_sizes(counts, recv))
    (arrived = wait(all_to_all(rows));  rows, regroup_map = regroup(arrived, recv))
    offsets = running sum of the local counts
    rows = body(rows)      # as captured; tables cut to the local experts, matmuls -> grouped_mm
    (rows = unpermute(rows, regroup_map);  rows = wait(all_to_all(rows)), sizes swapped)
    out = unpermute(rows, row_map, weights)      # or `post` as captured, where it is not just that

All rows of a side stand in one order there, so the permutations of the captured body vanish.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.gathers import erase_if_unread, gather_of
from moe_fx.passes.roles import (
    VIEWS,
    PairIds,
    PairWeights,
    Permutation,
    Rows,
    RowTable,
    argument,
    is_grouped_matmul,
    is_unary_rowwise,
    shape,
    value,
)
from moe_fx.plan import ExchangePlan
from moe_fx.region import Parts, Region

aten = torch.ops.aten
ops = torch.ops.moe_fx


class Rewrite(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        for region, plan in zip(context.regions, context.plans, strict=True):
            rewrite_region(module.graph, region, plan)
            if region.parts.replaces is not None:
                captured, stands_in = region.parts.replaces
                captured.replace_all_uses_with(stands_in, propagate_meta=False)
                erase_checks(module.graph, region.parts.captured)
        module.graph.eliminate_dead_code()
        for gather in dict.fromkeys(g for region in context.regions for g in region.parts.gathers):
            erase_if_unread(gather)
        module.graph.lint()
        module.recompile()
        return PassResult(module, changed=bool(context.regions))


def rewrite_region(graph: Graph, region: Region, plan: ExchangePlan) -> None:
    """Make ``region``'s users read a result computed by dialect ops, placed where the region's
    own result stood."""
    combined = region.parts.combined
    with graph.inserting_before(combined):
        result = _Emitter(graph, region.parts, plan).emit()
    combined.replace_all_uses_with(result, propagate_meta=False)
    result.meta.update({k: v for k, v in combined.meta.items() if k == "val"})


def erase_checks(graph: Graph, gone: Iterable[Node]) -> None:
    """Assertions on the data-dependent sizes of nodes that are to go would keep those alive."""
    sized = set(gone)
    for node in list(graph.nodes):
        if any(source in sized for source in node.all_input_nodes):
            if node.target in _CHECKS:
                graph.erase_node(node)
            elif not isinstance(value(node), Tensor):
                sized.add(node)


_CHECKS = (aten._assert_scalar.default, aten.sym_constrain_range_for_size.default)


class _Emitter:
    def __init__(self, graph: Graph, parts: Parts, plan: ExchangePlan) -> None:
        self.graph, self.parts, self.plan = graph, parts, plan
        self.trace = parts.combined.meta.get("stack_trace", "")
        self.values: dict[Node, Node] = {}
        self.local_tables: dict[Node, Node] = {}

    def call(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(op, args, kwargs)
        node.meta["stack_trace"] = self.trace
        return node

    def emit(self) -> Node:
        parts, plan = self.parts, self.plan
        self.counts = self.call(ops.expert_counts.default, parts.ids, plan.num_experts)
        permuted = self.call(ops.permute.default, parts.tokens, parts.ids)
        rows, row_map = self._item(permuted, 0), self._item(permuted, 1)
        if parts.weighs_tokens:
            rows = self._weighed(rows)
        if plan.exchanges:
            result = self._exchanged(rows)
        else:
            self._locate(rows, self.counts)
            result = self._run_body()
        return self._combine(result, row_map)

    def _weighed(self, rows: Node) -> Node:
        """Rows of tokens times their routing weights, in the tokens' dtype."""
        parts = self.parts
        columns = [self.call(aten.reshape.default, n, [-1, 1]) for n in (parts.weights, parts.ids)]
        factor = self._item(self.call(ops.permute.default, *columns), 0)
        product = self.call(aten.mul.Tensor, rows, factor)
        return self.call(aten._to_copy.default, product, dtype=value(parts.tokens).dtype)

    def _exchanged(self, rows: Node) -> Node:
        group = self.plan.group_name
        recv_counts = self.call(ops.exchange_counts.default, self.counts, group)
        sizes = self.call(ops.split_sizes.default, self.counts, recv_counts)
        send = self.call(aten.select.int, sizes, 0, 0)
        recv = self.call(aten.select.int, sizes, 0, 1)
        handle = self.call(ops.all_to_all.default, rows, send, recv, group)
        arrived = self.call(ops.wait.default, handle, rows, send, recv, group)
        regrouped = self.call(ops.regroup.default, arrived, recv_counts)
        self._locate(self._item(regrouped, 0), self.call(aten.sum.dim_IntList, recv_counts, [0]))
        result = self._run_body()
        tail = shape(self.parts.cut)[1:]
        by_source = self.call(
            ops.unpermute.default, result, self._item(regrouped, 1), None, [self.num_rows, *tail]
        )
        num_pairs = self.call(aten.sym_size.int, rows, 0)
        handle = self.call(ops.all_to_all.default, by_source, recv, send, group)
        return self.call(ops.wait.default, handle, by_source, recv, send, group, num_pairs)

    def _locate(self, rows: Node, counts: Node) -> None:
        """Rows sorted by local expert stand in for every dispatched row of the captured body."""
        self.num_rows = self.call(aten.sym_size.int, rows, 0)
        self.row_counts = counts
        self.offsets = self.call(aten.cumsum.default, counts, 0, dtype=torch.int32)
        self.values.update(dict.fromkeys(self.parts.dispatched, rows))
        self.row_ids: Node | None = None

    def _item(self, node: Node, index: int) -> Node:
        return self.call(operator.getitem, node, index)

    # -- the experts' side ---------------------------------------------------------------------

    def _run_body(self) -> Node:
        for node in self.parts.body:
            if node not in self.values and isinstance(self.parts.roles[node], Rows):
                self.values[node] = self._body_node(node)
        return self.values[self.parts.cut]

    def _body_node(self, node: Node) -> Node:
        roles = self.parts.roles
        if self._is_permuting(node):
            source = node.args[0]
            assert isinstance(source, Node)
            return self.values[source]
        if is_grouped_matmul(node):
            rows, table, _ = node.args
            return self._grouped_mm(self._rows(rows), self._localise(table))
        if node.target is aten.bmm.default and any(
            isinstance(roles.get(n), RowTable) for n in node.all_input_nodes
        ):
            return self._per_row_matmul(node)
        if node.target in VIEWS:
            return self.call(
                aten.reshape.default, self._rows(node.args[0]), [self.num_rows, *shape(node)[1:]]
            )
        return self._copy(node, self._rows)

    def _is_permuting(self, node: Node) -> bool:
        index: Any
        if node.target is aten.index.Tensor:
            indices: Any = node.args[1]
            (index,) = indices
        elif node.target is aten.index_select.default:
            index = node.args[2]
        else:
            return False
        return isinstance(self.parts.roles.get(index), Permutation)

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
        return self.call(aten.unsqueeze.default, self._grouped_mm(flat, weight), vector_dim)

    def _grouped_mm(self, rows: Node, weight: Node) -> Node:
        separate = self._separate(weight)
        if separate is not None:
            return self.call(ops.grouped_mm_list.default, rows, separate, self.offsets)
        return self.call(ops.grouped_mm.default, rows, weight, self.offsets)

    def _separate(self, table: Node) -> list[Node] | None:
        """The matrices behind a table that is a stack of them, so that no copy is made."""
        if table.target is aten.stack.default:
            return list(table.args[0])  # type: ignore[arg-type]
        if table.target is not aten.transpose.int:
            return None
        source, *dims = table.args
        assert isinstance(source, Node)
        matrices = self._separate(source)
        if matrices is None or set(dims) != {1, 2}:
            return None
        return [self.call(aten.transpose.int, matrix, 0, 1) for matrix in matrices]

    def _rows(self, node: Any) -> Any:
        """The value on this side of a node the captured body reads."""
        role = self.parts.roles.get(node)
        if isinstance(role, RowTable):
            return self.call(aten.index.Tensor, self._table(node), [self._ids()])
        return self.values.get(node, node)

    def _ids(self) -> Node:
        if self.row_ids is None:
            self.row_ids = self.call(
                aten.repeat_interleave.Tensor, self.row_counts, output_size=self.num_rows
            )
        return self.row_ids

    def _table(self, node: Any) -> Node:
        """The local experts' table behind rows gathered from it, with whatever was done to each
        row since done to each expert instead."""
        if node in self.local_tables:
            return self.local_tables[node]
        index = next((n for n in node.all_input_nodes if self._is_pair_ids(n)), None)
        if index is not None:
            source = next(n for n in node.all_input_nodes if n is not index)
            table = self._localise(source)
        elif self._is_permuting(node):
            table = self._table(node.args[0])
        elif node.target in VIEWS:
            sizes = [self.plan.local_experts, *shape(node)[1:]]
            table = self.call(aten.reshape.default, self._table(node.args[0]), sizes)
        else:
            table = self._copy(node, self._table_or_constant)
        self.local_tables[node] = table
        return table

    def _table_or_constant(self, node: Node) -> Node:
        return self._table(node) if isinstance(self.parts.roles.get(node), RowTable) else node

    def _is_pair_ids(self, node: Node) -> bool:
        return isinstance(self.parts.roles.get(node), PairIds)

    def _localise(self, table: Any) -> Node:
        """``[E, ...] -> [E/W, ...]``: the shard of a gathered table, a view of a replicated one."""
        if table in self.local_tables:
            return self.local_tables[table]
        gather = gather_of(table)
        if gather is not None:
            local = gather.shard
        elif table.target is aten.stack.default:
            first = self.plan.first_expert
            local = self.call(
                aten.stack.default, table.args[0][first : first + self.plan.local_experts]
            )
        elif not self.plan.exchanges:
            local = self._ungathered(table)
        elif table.op == "call_function" and is_unary_rowwise(table):
            source = table.args[0]
            if table.target in VIEWS:
                sizes = [self.plan.local_experts, *shape(table)[1:]]
                local = self.call(aten.reshape.default, self._localise(source), sizes)
            else:
                local = self._copy(table, lambda n: self._localise(n) if n is source else n)
        else:
            first = self.plan.first_expert
            local = self.call(aten.slice.Tensor, table, 0, first, first + self.plan.local_experts)
        self.local_tables[table] = local
        return local

    def _ungathered(self, table: Node) -> Node:
        """With one rank a shard is the whole: drop the gather below, if there is one."""
        if table.op != "call_function" or not is_unary_rowwise(table):
            return table
        source = table.args[0]
        assert isinstance(source, Node)
        local = self._localise(source)
        return (
            table if local is source else self._copy(table, lambda n: local if n is source else n)
        )

    # -- back at the tokens' side --------------------------------------------------------------

    def _combine(self, rows: Node, row_map: Node) -> Node:
        parts = self.parts
        summed = parts.combined.target is ops.unpermute.default
        weights = parts.combined.args[2] if summed else self._plain_weights()
        num_tokens = self.call(aten.sym_size.int, parts.tokens, 0)
        if summed or weights is not None:
            sizes = [num_tokens, *shape(parts.combined)[1:]]
            return self.call(ops.unpermute.default, rows, row_map, weights, sizes)
        num_pairs = self.call(aten.sym_size.int, row_map, 0)
        sizes = [num_pairs, *shape(parts.cut)[1:]]
        self.values = {parts.cut: self.call(ops.unpermute.default, rows, row_map, None, sizes)}
        for node in parts.nodes:
            if isinstance(parts.roles[node], PairWeights) or node in parts.post:
                self.values[node] = self._post_node(node)
        return self.values[parts.combined]

    def _post_node(self, node: Node) -> Node:
        if self._is_permuting(node):
            source = node.args[0]
            assert isinstance(source, Node)
            return self.values[source]
        return self._copy(node, lambda n: self.values.get(n, n))

    def _plain_weights(self) -> Node | None:
        """The weights if all that follows the cut is: times the weights, back to token order, sum;
        as a ``[T, K]`` node of the product's dtype."""
        parts = self.parts
        if parts.weights is None:
            return None
        muls = [n for n in parts.post if n.target is aten.mul.Tensor]
        others = [
            n
            for n in parts.post
            if n is not parts.combined
            and n not in muls
            and not self._is_permuting(n)
            and n.target not in (*VIEWS, aten.unsqueeze.default)
        ]
        pair_weights = [n for n in others if isinstance(parts.roles[n], PairWeights)]
        if len(muls) != 1 or len(pair_weights) != len(others) or len(shape(parts.cut)) != 2:
            return None
        factors = [n for n in muls[0].all_input_nodes if _is_weights(parts, n)]
        if len(factors) != 1 or argument(parts.combined, 3, "dtype") is not None:
            return None
        if any(n.target is not aten._to_copy.default for n in pair_weights):
            return None
        dtype = value(factors[0]).dtype
        if dtype == value(parts.weights).dtype:
            return parts.weights
        return self.call(aten._to_copy.default, parts.weights, dtype=dtype)

    def _copy(self, node: Node, translate: Callable[[Node], Any]) -> Node:
        copy = self.call(
            node.target,  # type: ignore[arg-type]
            *map_arg(node.args, translate),
            **map_arg(node.kwargs, translate),
        )
        copy.meta["stack_trace"] = node.meta.get("stack_trace", self.trace)
        return copy


def _is_weights(parts: Parts, node: Node) -> bool:
    return isinstance(parts.roles.get(node), PairWeights)
