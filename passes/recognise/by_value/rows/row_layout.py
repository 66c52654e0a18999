"""The experts' body in the layout of rows, whatever layout the model computes it in.

Contract. In: a node of the captured body (dense ``[E, T, F]``, gathered ``[T, K, F]``, places
``[E, C, F]``, one expert's rows ``[n, F]`` …), the tokens it is computed from, and which nodes hold
routing values only. Out: a graph of its own that computes the same from rows ``[N, H]`` sorted by
expert, their expert ids and the running sum of their counts; tables ``[E, …]`` meet them in
``grouped_mm``.

Every dim of a captured node is either a *feature* or one that *tells rows apart* (tokens, slots,
experts, places, in any order and grouping). Ops along features are copied; ops that only move rows
(repeat, gather, a one-hot matmul, a write into a buffer) vanish; a matmul that pairs the rows' and
a table's experts becomes a grouped one. Routing values that multiply rows are left out.

Pseudo-code::

    tokens -> rows;  a parameter [E, ...] -> a table once an op pairs its experts with rows
    lay(node) = the op's rule on its laid operands, or Refusal

What is *not* checked here is which row goes where and what it is weighted with: the result is a
hypothesis, to be proved by value (`by_value.py`). Rejects: ops that mix rows, matmuls of rows with
rows, sizes of features that are not constants.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from moe_fx.graph.contraction import contraction
from moe_fx.graph.feature_dims import DIM_OF, TRAILING
from moe_fx.graph.nodes import (
    ELEMENTWISE_COPIES,
    VIEWS,
    is_grouped_matmul,
    is_pointwise,
    is_random,
    same,
    shape,
    tensor_inputs,
    value,
)
from moe_fx.graph.refusal import ByChance, Refusal
from moe_fx.passes.recognise.by_value.rows.layout import Kind, Laid, NotConstant, is_buffer
from moe_fx.passes.recognise.by_value.rows.layout_matmuls import LayoutMatmuls
from moe_fx.passes.recognise.by_value.rows.layout_moves import (
    READS_BY_INDEX,
    WRITES_BY_INDEX,
    LayoutMoves,
    trailing,
)

aten = torch.ops.aten

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


class RowLayout(LayoutMoves, LayoutMatmuls):
    """``lay`` gives a captured node's value in the layout of rows. ``met``: the nodes in which rows
    met a table so far."""

    @property
    def not_constant(self) -> NotConstant | None:
        """What kept the body from reaching further, if a size did."""
        refused = self._refused.values()
        return next((each for each in refused if isinstance(each, NotConstant)), None)

    def lay(self, node: Node) -> Laid:
        """Iterative, since bodies may be long."""
        stack = [node]
        while stack:
            current = stack[-1]
            if current in self._refused:
                raise self._refused[current]
            missing = [n for n in self._inputs(current) if n not in self.laid]
            if missing and not self._has_rule(current):
                self._refused[current] = self._unknown(current)
                raise self._refused[current]
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
        if is_random(node):
            raise ByChance(node)
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
        raise self._unknown(node)

    def _unknown(self, node: Node) -> Refusal:
        return Refusal(f"{node.target} is not known to keep rows apart", node, 3)

    def _has_rule(self, node: Node) -> bool:
        return (
            node.target is operator.getitem
            or is_random(node)
            or is_grouped_matmul(node)
            or contraction(node) is not None
            or is_pointwise(node)
            or node.target in DIM_OF
            or node.target in TRAILING
            or any(node.target in targets for targets, _ in _RULES)
        )

    def _masked(self, node: Node) -> Laid:
        kinds = [self.laid[n] for n in tensor_inputs(node)]
        rows = [laid for laid in kinds if laid.kind in ("rows", "table")]
        others = {laid.kind for laid in kinds if laid not in rows}
        if len(rows) == 1 and others <= {"route", "buffer"} and others:
            self.body.weighed |= not rows[0].met
            return self.moved(node, rows[0], trailing(rows[0], len(shape(node)), node))
        return self._pointwise(node)

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
        for n in node.all_input_nodes:
            if isinstance(value(n), torch.SymFloat):  # a limit or a scale of the model
                own[n] = self._operand(n, n.name)
        copy = self.call(
            node.target,
            *map_arg(node.args, lambda n: own.get(n, n)),
            **map_arg(node.kwargs, lambda n: own.get(n, n)),
        )
        if any(x.kind in ("table", "constant") for x in laid.values()) and met and kind == "rows":
            self._note_meeting(node, laid)
        return Laid(kind, tuple(features), copy, met)

    def _note_meeting(self, node: Node, laid: Mapping[Node, Laid]) -> None:
        for n, x in laid.items():
            if x.kind == "table" or (x.kind == "constant" and self._is_table(n)):
                self.met.append(node)
                return

    def _leave_out(self, node: Node, route: Node, features: Sequence[bool]) -> None:
        dims = shape(route)
        if node.target not in (aten.mul.Tensor, aten.div.Tensor):
            raise Refusal(f"routing values take part in {node.target}", node, 3)
        if any(
            features[len(features) - len(dims) + at] and not same(size, 1)
            for at, size in enumerate(dims)
        ):
            raise Refusal("routing values differ between the features of a row", node, 3)


_RULES: tuple[tuple[Collection[Any], Callable[[RowLayout, Node], Laid]], ...] = (
    ((*VIEWS, aten.flatten.using_ints, aten.unflatten.int), RowLayout._view),
    (_PERMUTES, RowLayout._permuted),
    ((aten.unsqueeze.default,), RowLayout._unsqueezed),
    ((aten.squeeze.dim,), RowLayout._squeezed),
    (_MOVES, RowLayout._moving),
    (READS_BY_INDEX, RowLayout._read),
    (WRITES_BY_INDEX, RowLayout._written),
    (_MASKS, RowLayout._masked),
    (_PADS, RowLayout._padded),
    ((aten.cat.default,), RowLayout._concatenated),
)
