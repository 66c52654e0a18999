"""A dispatcher's way through a graph: from the rows it sorts to the tokens it sums them to.

`DispatcherWay(flow, end)` goes back from the ``unpermute`` that ends it, node by node, and raises
`Refusal` at the first that is not the dispatcher's own (`moe_fx.dispatcher.exchange.Step`).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.compat import resolve_group
from moe_fx.graph.flow import Flow, closure
from moe_fx.graph.nodes import same, shape, value
from moe_fx.graph.refusal import Refusal

aten = torch.ops.aten
ops = torch.ops.moe_fx


class DispatcherWay:
    """The nodes of one dispatcher's way, from its last one; raises `Refusal`."""

    def __init__(self, flow: Flow, end: Node) -> None:
        self.flow, self.end = flow, end
        back = self._node(end.args[0], ops.wait)
        combine = self._node(back.args[0], ops.all_to_all)
        self.permute = self._of_item(end.args[1], ops.permute, 1)
        self.tokens, self.ids = self._given(self.permute.args[0]), self._given(self.permute.args[1])
        self.weights = None if end.args[2] is None else self._given(end.args[2])
        there = self._dispatch()
        self.group, self.world = str(there.args[4]), resolve_group(str(there.args[4])).size()
        self.regroup = next((n for n in there.users if n.target is ops.regroup.default), None)
        self.rows = self._rows(there)
        self.out = self._result(combine)
        self._check_sizes(there.args[2:4], combine.args[1:3])
        self.counts = [
            n for n in self.received.users if n.target is aten.sum.dim_IntList and n.args[1] == [0]
        ]
        self.arrived_ids = [
            n for n in self.received.users if n.target is ops.arrived_experts.default
        ]
        self._check_readers()
        self._check_escapes()
        if flow.selection_above(self.ids) is None:
            raise Refusal("the expert ids come from no top-k of this graph", self.ids)

    @property
    def top_k(self) -> int:
        return int(shape(self.ids)[1])

    @property
    def local_experts(self) -> int:
        return self.num_experts // self.world

    def _node(self, node: Any, packet: Any) -> Node:
        if not isinstance(node, Node) or node.target is not packet.default:
            raise Refusal(f"{node} is not the dispatcher's {packet}", self.end)
        return node

    def _of_item(self, node: Any, packet: Any, index: int) -> Node:
        if isinstance(node, Node) and node.target is operator.getitem and node.args[1] == index:
            return self._node(node.args[0], packet)
        raise Refusal(f"{node} is not the dispatcher's {packet}[{index}]", self.end)

    def _given(self, node: Any) -> Node:
        assert isinstance(node, Node)
        return node

    def _dispatch(self) -> Node:
        """The wait for the rows that ``permute`` sorted."""
        sent = _item(self.permute, 0)
        starts = (
            [] if sent is None else [n for n in sent.users if n.target is ops.all_to_all.default]
        )
        waits = [n for start in starts for n in start.users if n.target is ops.wait.default]
        if len(waits) != 1 or not same(shape(sent)[0], _pairs(self.ids)):
            raise Refusal("the sorted rows are not sent once, all of them", self.permute)
        return waits[0]

    def _rows(self, there: Node) -> Node:
        if self.regroup is None:
            return there
        rows = _item(self.regroup, 0)
        if rows is None:
            raise Refusal("the rows that arrive are put in order and not read", there)
        return rows

    def _result(self, combine: Node) -> Node:
        """The experts' result for `rows`, in their order."""
        sent = self._given(combine.args[0])
        if self.regroup is None:
            return sent
        undone = sent.target is ops.unpermute.default and sent.args[2] is None
        if not undone or sent.args[1] is not _item(self.regroup, 1):
            raise Refusal("the experts' rows are not put back in the order they came in", sent)
        return self._given(sent.args[0])

    def _check_sizes(self, there: Any, back: Any) -> None:
        read = [_place_in_sizes(n) for n in (*there, *back)]
        sources = {place[0] for place in read if place is not None}
        if len(sources) != 1 or [place and place[1] for place in read] != [0, 1, 1, 0]:
            raise Refusal(
                "the exchange and its way back do not have the dispatcher's sizes", self.end
            )
        self.sizes = self._node(sources.pop(), ops.checked_sizes)
        self.num_experts = int(self.sizes.args[1])  # type: ignore[arg-type]
        gathered = self._node(self.sizes.args[0], ops.gather_counts)
        counted = self._of_item(gathered.args[0], ops.dispatch_counts, 0)
        if counted.args[0] is not self.ids or gathered.args[2] != self.group:
            raise Refusal("the counts are not those of the ids that sort the rows", counted)
        own = [n for n in gathered.users if n.target is aten.slice.Tensor]
        rank = int(self.sizes.args[2])  # type: ignore[arg-type]
        bounds = (rank * self.local_experts, (rank + 1) * self.local_experts)
        if len(own) != 1 or own[0].args[1] != 1 or tuple(own[0].args[2:4]) != bounds:
            raise Refusal("the counts received are not those of this rank's experts", gathered)
        self.received = own[0]
        if self.regroup is not None and self.regroup.args[1] is not self.received:
            raise Refusal("rows are regrouped by other counts than the dispatcher's", self.regroup)

    def _check_readers(self) -> None:
        known = {self.regroup, *self.counts, *self.arrived_ids}
        others = [n for n in self.received.users if n not in known]
        if others:
            raise Refusal(f"the counts received are read by {others[0]}", others[0])
        if self.regroup is None and self.counts and self.local_experts > 1 and not self.arrived_ids:
            raise Refusal("rows are told apart by their number, but not sorted", self.rows)

    def _check_escapes(self) -> None:
        inside = set(self.nodes())
        for node in inside - {self.end}:
            for user in node.users:
                holds_rows = isinstance(value(node), (Tensor, tuple, list))
                if holds_rows and user not in inside and not _is_size(user):
                    raise Refusal(f"{node}, on the dispatcher's way, is read by {user}", user)

    @property
    def inputs(self) -> list[Node]:
        return [n for n in (self.tokens, self.ids, self.weights) if n is not None]

    def body(self) -> list[Node]:
        """What is done to rows, in graph order."""
        starts = [self.rows, *self.counts, *self.arrived_ids]
        inside = self.flow.below(*starts) & self.flow.above(self.out)
        return [n for n in self.flow.ordered(inside) if n not in starts]

    def nodes(self) -> list[Node]:
        """The whole way, in graph order."""
        inside = self.flow.below(self.permute, self.received, self.sizes) & self.flow.above(
            self.end
        )
        counting = closure(
            [self.sizes], lambda n: [s for s in n.all_input_nodes if s is not self.ids]
        )
        return self.flow.ordered(inside | counting | {self.permute})


def _is_size(node: Node) -> bool:
    """A number of rows, or an item of a tuple that nothing reads."""
    unread = node.target is operator.getitem and not node.users
    return unread or node.target is aten.sym_size.int


def _item(node: Node, index: int) -> Node | None:
    items = (n for n in node.users if n.target is operator.getitem and n.args[1] == index)
    return next(items, None)


def _pairs(ids: Node) -> Any:
    tokens, top_k = shape(ids)
    return tokens * top_k


def _place_in_sizes(node: Any) -> tuple[Node, int] | None:
    """(the ``checked_sizes`` node, 0 for sizes sent and 1 for sizes received)."""
    if not isinstance(node, Node) or node.target is not operator.getitem:
        return None
    unbound, index = node.args
    if not isinstance(unbound, Node) or unbound.target is not aten.unbind.int:
        return None
    chunk = unbound.args[0]
    if not isinstance(chunk, Node) or chunk.target is not aten.select.int:
        return None
    source = chunk.args[0]
    return (source, int(index)) if isinstance(source, Node) and index in (0, 1) else None  # type: ignore[arg-type]
