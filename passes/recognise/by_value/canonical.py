"""A region that was read by value, in dialect ops, beside the captured nodes it replaces.

Contract. In: a `Reading`. Out: `Parts` of nodes added to the graph in front of the captured result,
which nothing reads yet: what `rewrite.py` would make of the region on one rank, and so what
verification compares an exchange with. ``Parts.replaces`` says which node they stand for; the
rewrite puts them in its place, and a region that is declined leaves them to dead-code elimination.

Pseudo-code::

    ids, weights [T, K] from the router's values
    counts, rows = expert_counts(ids), permute(tokens)
    (rows times weights, if the model weighs tokens before the experts)
    combined = unpermute(body(rows), weights);  + base, in the result's shape and dtype
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from moe_fx.compat import FakeValues
from moe_fx.graph.lineage import trace
from moe_fx.graph.nodes import same, shape, tensor_inputs, value
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.recognise.by_value.by_value import Reading
from moe_fx.passes.recognise.tables import check_tables
from moe_fx.passes.roles import PairIds, PerToken, Role, Rows, RowTable
from moe_fx.region import Parts

aten = torch.ops.aten
ops = torch.ops.moe_fx


def canonical(reading: Reading, values: FakeValues) -> Parts:
    """Raises `Refusal` if the tables can't be those of experts (`tables.py`)."""
    return _Builder(reading, values).parts()


class _Builder:
    def __init__(self, reading: Reading, values: FakeValues) -> None:
        self.reading, self.values = reading, values
        self.graph = reading.result.graph
        self.trace = reading.result.meta.get("stack_trace", "")
        self.roles: dict[Node, Role] = {}
        self.inside: list[Node] = []

    def outer(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        """A node in front of the captured result, outside the region."""
        with self.graph.inserting_before(self.reading.result):
            node = self.graph.call_function(op, args, kwargs)
        node.meta["stack_trace"] = self.trace
        self.values.compute(node)
        return node

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        """A node of the region."""
        node = self.outer(op, *args, **kwargs)
        self.inside.append(node)
        return node

    def parts(self) -> Parts:
        reading = self.reading
        late = [n for n in (*reading.ids.nodes, reading.tokens) if not n < reading.result]
        if late:
            raise Refusal(f"{late[0]} is computed behind the experts' result", late[0], 5)
        tokens = self._matrix(reading.tokens, shape(reading.tokens)[-1])
        ids = self._ids()
        valid = self._valid(ids) if reading.weighing.guarded else None
        if valid is not None:
            ids = self.outer(aten.where.ScalarOther, valid, ids, 0)
        weights = self._weights(ids)
        if valid is not None:
            weights = self._without(weights, valid)
        self.roles |= {node: PerToken() for node in (ids, weights) if node is not None}
        counts = self.call(ops.expert_counts.default, ids, reading.selection.num_experts)
        permuted = self.call(ops.permute.default, tokens, ids)
        rows, row_map = (self.call(operator.getitem, permuted, at) for at in (0, 1))
        if reading.weighing.before:
            assert weights is not None
            rows = self._weighed(rows, weights, ids)
        self.roles[rows] = Rows("sorted", "token")
        offsets = self.call(aten.cumsum.default, counts, 0, dtype=torch.int32)
        cut, tables, body = self._body(rows, counts, offsets, ids)
        num_tokens = self.call(aten.sym_size.int, tokens, 0)
        after = None if reading.weighing.before else weights
        sizes = [num_tokens, *shape(cut)[1:]]
        combined = self.call(ops.unpermute.default, cut, row_map, after, sizes)
        experts = reading.selection.num_experts
        selected: dict[Node, Role] = {n: PerToken() for n in self._selected()}
        check_tables(tables, reading.tokens, body, selected, experts)
        whole = self._whole([tokens, ids, weights, *tables])
        lineage = trace(tables, experts, whole)
        return Parts(
            select=reading.selection.node,
            tokens=tokens,
            ids=ids,
            weights=weights,
            nodes=tuple(self.inside),
            body=(rows, *body),
            cut=cut,
            post=(combined,),
            combined=combined,
            dispatched=(rows,),
            tables=tuple(tables),
            gathers=tuple(lineage.gathers.values()),
            roles=self.roles,
            distinct=False,
            weighs_tokens=reading.weighing.before,
            replaces=(reading.result, self._result(combined)),
            captured=reading.captured,
        )

    # -- the router's side ---------------------------------------------------------------------

    def _matrix(self, node: Node, columns: Any) -> Node:
        if len(shape(node)) == 2:
            return node
        return self.outer(aten.reshape.default, node, [-1, columns])

    def _ids(self) -> Node:
        nodes = self.reading.ids.nodes
        each = self.reading.selection.top_k // len(nodes)
        columns = [self._matrix(node, each) for node in nodes]
        return columns[0] if len(columns) == 1 else self.outer(aten.cat.default, columns, 1)

    def _valid(self, ids: Node) -> Node:
        """Which ids are those of experts; the others count for nothing."""
        low = self.outer(aten.ge.Scalar, ids, 0)
        high = self.outer(aten.lt.Scalar, ids, self.reading.selection.num_experts)
        return self.outer(aten.logical_and.default, low, high)

    def _first_times(self, ids: Node) -> Node:
        """Which experts come up for the first time for their token."""
        rows, columns = (self.outer(aten.unsqueeze.default, ids, dim) for dim in (2, 1))
        same_before = self.outer(aten.tril.default, self.outer(aten.eq.Tensor, rows, columns), -1)
        return self.outer(aten.logical_not.default, self.outer(aten.any.dim, same_before, 2))

    def _without(self, weights: Node | None, valid: Node) -> Node:
        if weights is not None:
            return self.outer(aten.where.ScalarOther, valid, weights, 0.0)
        dtype = value(self.reading.tokens).dtype
        return self.outer(aten._to_copy.default, valid, dtype=dtype)

    def _weights(self, ids: Node) -> Node | None:
        weighing, top_k = self.reading.weighing, self.reading.selection.top_k
        node = weighing.node
        if node is None:
            return None
        if weighing.shape == "pairs":
            weights = node
            if len(shape(node)) != 2 or not _same_columns(node, top_k):
                weights = self.outer(aten.reshape.default, node, [-1, top_k])
        else:
            dims = shape(node)
            if weighing.shape == "experts first":
                flat = self.outer(aten.reshape.default, node, [dims[0], -1])
                node = self.outer(aten.transpose.int, flat, 0, 1)
            elif weighing.shape == "places":
                node = self.outer(aten.sum.dim_IntList, node, [-1])
            table = self._matrix(node, shape(node)[-1])
            index = ids
            if value(ids).dtype != torch.int64:
                index = self.outer(aten._to_copy.default, ids, dtype=torch.int64)
            weights = self.outer(aten.gather.default, table, 1, index)
            if top_k > 1 and not self.reading.selection.distinct:
                weights = self._without(weights, self._first_times(ids))
        if weighing.mask is not None:
            mask = self.outer(aten.reshape.default, weighing.mask, [-1, top_k])
            weights = self.outer(aten.mul.Tensor, weights, mask)
        return weights

    def _weighed(self, rows: Node, weights: Node, ids: Node) -> Node:
        """Rows of tokens times their routing weights."""
        columns = [self.call(aten.reshape.default, node, [-1, 1]) for node in (weights, ids)]
        factor = self.call(operator.getitem, self.call(ops.permute.default, *columns), 0)
        product = self.call(aten.mul.Tensor, rows, factor)
        if value(product).dtype != value(rows).dtype:
            product = self.call(aten._to_copy.default, product, dtype=value(rows).dtype)
        return product

    # -- the experts ---------------------------------------------------------------------------

    def _body(
        self, rows: Node, counts: Node, offsets: Node, ids: Node
    ) -> tuple[Node, list[Node], list[Node]]:
        body = self.reading.body
        nodes: dict[Node, Node] = {body.rows: rows, body.offsets: offsets}
        if body.ids.users:
            num_rows = self.call(aten.sym_size.int, rows, 0)
            row_ids = self.call(aten.repeat_interleave.Tensor, counts, output_size=num_rows)
            self.roles[row_ids] = PairIds("sorted", ids)
            nodes[body.ids] = row_ids
        tables: dict[Node, None] = {}
        for placeholder, of in body.operands.items():
            stands_for = of if isinstance(of, Node) else self.outer(aten.stack.default, list(of))
            nodes[placeholder] = stands_for
        made = {nodes[t] for t in body.tables}
        whole = set(nodes.values()) - {rows, offsets, nodes.get(body.ids)}
        run: list[Node] = []
        for step in body.graph.nodes:
            if step.op != "call_function":
                continue
            args, kwargs = map_arg((step.args, step.kwargs), nodes.__getitem__)
            inputs = [nodes[n] for n in step.all_input_nodes]
            on_table = not made.isdisjoint(inputs) and whole.issuperset(inputs)
            added = (self.outer if on_table else self.call)(step.target, *args, **kwargs)
            nodes[step] = added
            if on_table:
                made.add(added)
                whole.add(added)
                continue
            tables |= dict.fromkeys(n for n in inputs if n in made)
            of_table = step.target is aten.index.Tensor and inputs[0] in made
            self.roles[added] = RowTable("sorted") if of_table else Rows("sorted", "expert")
            run.append(added)
        result = body.graph.output_node().args[0]
        assert isinstance(result, Node)
        return nodes[result], list(tables), run

    def _whole(self, known: list[Node | None]) -> list[Node]:
        """What the region reads besides ``known``."""
        read = {source for node in self.inside for source in tensor_inputs(node)}
        return sorted(read - {*self.inside, *known})

    def _selected(self) -> list[Node]:
        """All that depends on the selection, up to the captured result."""
        end = self.reading.result
        found, stack = set(), list(self.reading.selection.selectors)
        while stack:
            node = stack.pop()
            if node not in found and not end < node:
                found.add(node)
                stack += node.users
        return list(found)

    # -- the result ----------------------------------------------------------------------------

    def _result(self, combined: Node) -> Node:
        result, base = self.reading.result, self.reading.base
        node = combined
        if len(shape(result)) != 2:
            node = self.outer(aten.reshape.default, node, self._sizes(shape(combined)[-1]))
        if value(node).dtype != value(result).dtype:
            node = self.outer(aten._to_copy.default, node, dtype=value(result).dtype)
        if base is not None:
            node = self.outer(aten.add.Tensor, base, node)
        return node

    def _sizes(self, hidden: Any) -> list[Any]:
        """The captured result's dims, a symbolic one read from a tensor that has it."""
        lead = list(shape(self.reading.result)[:-1])
        symbolic = [at for at, size in enumerate(lead) if not isinstance(size, int)]
        if len(symbolic) == 1:
            lead[symbolic[0]] = -1
        elif symbolic:
            like = self._with_dims(lead)
            lead = [self.outer(aten.sym_size.int, like, at) for at in range(len(lead))]
        return [*lead, hidden]

    def _with_dims(self, lead: list[Any]) -> Node:
        seen, stack = set(), [self.reading.tokens]
        while stack:
            node = stack.pop()
            dims = shape(node)
            if len(dims) > len(lead) and str(dims[: len(lead)]) == str(tuple(lead)):
                return node
            for source in tensor_inputs(node):
                if source not in seen:
                    seen.add(source)
                    stack.append(source)
        raise Refusal(f"no input has the dims {lead} of the result", self.reading.result, 5)


def _same_columns(node: Node, top_k: int) -> bool:
    return same(shape(node)[-1], top_k)
