"""The program that a dispatcher's exchange is equal to, in front of the exchange's last node.

Contract. In: a `DispatcherWay`. Out: a `StandIn` whose nodes are in the graph and read by nothing.
Raises `Refusal` if an op of the experts cannot take those of all ranks; added nodes stay.

Pseudo-code::

    tables = all_gather(each tensor of L experts that the experts read)
    rows = tokens by expert (tokens by pair, if they were not regrouped);  counts [L] -> [E]
    result = sum of experts(rows), put back in pair order, times the weights

In the experts' ops, numbers that count experts (``bins=L``) become those of all.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate, map_arg

from moe_fx.compat import FakeValues
from moe_fx.graph.nodes import VIEWS, is_unary_rowwise, same, shape, value
from moe_fx.graph.refusal import Refusal
from moe_fx.passes.base import StandIn
from moe_fx.passes.recognise.exchanged.dispatcher_way import DispatcherWay

aten, collectives = torch.ops.aten, torch.ops._c10d_functional


def build(found: DispatcherWay, module: GraphModule) -> StandIn:
    """The stand-in, in front of the exchange's last node; nothing reads it yet."""
    return _Builder(found, FakeValues(module.graph)).stand_in()


class _Builder:
    def __init__(self, found: DispatcherWay, values: FakeValues) -> None:
        self.found, self.values, self.graph = found, values, found.end.graph
        self.added: list[Node] = []
        self.gathered: dict[Node, Node] = {}
        self.gathers: list[Node] = []
        self.shards: list[Node] = []

    def call(self, op: Any, *args: Any, **kwargs: Any) -> Node:
        with self.graph.inserting_before(self.found.end):
            node = self.graph.call_function(op, args, kwargs)
        node.meta["stack_trace"] = self.found.end.meta.get("stack_trace", "")
        try:
            self.values.compute(node)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            said = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise Refusal(f"with all experts, {op} fails: {said}", self.found.end) from error
        self.added.append(node)
        return node

    def stand_in(self) -> StandIn:
        found = self.found
        flat = self.call(aten.reshape.default, found.ids, [-1])
        counts = self.call(aten.bincount.default, flat, None, found.num_experts)
        sorted_rows = found.regroup is not None or not found.arrived_ids
        order = rows = None
        if sorted_rows:
            order = self.call(aten.argsort.stable, flat, stable=True)
            token = self.call(aten.floor_divide.default, order, found.top_k)
            rows = self.call(aten.index.Tensor, found.tokens, [token])
        else:
            width = shape(found.tokens)[1]
            each = self.call(aten.unsqueeze.default, found.tokens, 1)
            copies = self.call(aten.expand.default, each, [-1, found.top_k, -1])
            rows = self.call(aten.reshape.default, copies, [self._num_pairs(), width])
        result = self._experts(rows, counts, flat)
        if order is not None:
            inverse = self.call(aten.argsort.default, order)
            result = self.call(aten.index.Tensor, result, [inverse])
        num_tokens = self._num_tokens()
        width = shape(result)[-1]
        grouped = self.call(aten.view.default, result, [num_tokens, found.top_k, width])
        if found.weights is not None:
            factor = self.call(aten.unsqueeze.default, found.weights, -1)
            grouped = self.call(aten.mul.Tensor, grouped, factor)
        summed = self.call(aten.sum.dim_IntList, grouped, [1])
        chains = [n for n in self.gathered if n not in self.shards]
        return StandIn(
            captured=found.end,
            result=summed,
            nodes=tuple(self.added),
            gathers=tuple(self.gathers),
            shards=tuple(self.shards),
            replaced=tuple(found.flow.ordered([*found.nodes(), *chains])),
        )

    def _num_tokens(self) -> Any:
        size = shape(self.found.ids)[0]
        return size if isinstance(size, int) else self.call(aten.sym_size.int, self.found.tokens, 0)

    def _num_pairs(self) -> Any:
        tokens, top_k = self._num_tokens(), self.found.top_k
        return tokens * top_k if isinstance(tokens, int) else self.call(operator.mul, tokens, top_k)

    def _experts(self, rows: Node, counts: Node, flat: Node) -> Node:
        """The captured body on all rows, with all experts."""
        found = self.found
        to: dict[Node, Any] = {found.rows: rows}
        to |= dict.fromkeys(found.counts, counts) | dict.fromkeys(found.arrived_ids, flat)
        for node in found.body():
            if node.target is aten.sym_size.int and same(value(node), shape(found.rows)[0]):
                to[node] = self._num_pairs()
                continue
            args, kwargs = _of_all_experts(node, found.local_experts, found.num_experts)
            args, kwargs = map_arg((args, kwargs), lambda n: to[n] if n in to else self._table(n))
            to[node] = self.call(node.target, *args, **kwargs)
            to[node].meta["stack_trace"] = node.meta.get("stack_trace", "")
        result = to.get(found.out)
        if not isinstance(result, Node):
            raise Refusal("the experts' result does not come from the rows", found.out)
        return result

    def _table(self, node: Node) -> Node:
        """What the body reads from outside: gathered, if it holds something for each local
        expert."""
        if node in self.gathered:
            return self.gathered[node]
        val = value(node)
        if not isinstance(val, Tensor) or not shape(node):
            return node
        if not same(shape(node)[0], self.found.local_experts):
            return node
        if node.op == "call_function" and is_unary_rowwise(node):
            (source,) = node.all_input_nodes
            full = self._table(source)
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: full if n is source else n)
            if node.target in VIEWS:
                args = (full, [self.found.num_experts, *shape(node)[1:]])
            self.gathered[node] = self.call(node.target, *args, **kwargs)
            return self.gathered[node]
        start = self.call(
            collectives.all_gather_into_tensor.default, node, self.found.world, self.found.group
        )
        full = self.call(collectives.wait_tensor.default, start)
        self.gathers.append(full)
        self.shards.append(node)
        self.gathered[node] = full
        return full


def _of_all_experts(node: Node, local: int, everyone: int) -> tuple[Any, Any]:
    """The node's arguments with numbers of local experts made numbers of all."""
    named = _EXPERT_NUMBERS.get(node.target)
    if named is None or not hasattr(node.target, "_schema"):
        return node.args, node.kwargs
    to = {local: everyone, local - 1: everyone - 1}

    def number(argument: Any) -> Any:
        is_number = isinstance(argument, (int, float)) and not isinstance(argument, bool)
        return type(argument)(to[argument]) if is_number and argument in to else argument

    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    args = tuple(
        map_aggregate(a, number) if name in named else a
        for name, a in zip(names, node.args, strict=False)
    )
    kwargs = {k: map_aggregate(v, number) if k in named else v for k, v in node.kwargs.items()}
    return args, kwargs


_EXPERT_NUMBERS: dict[Any, tuple[str, ...]] = {
    aten.histc.default: ("bins", "max"),
    aten.bincount.default: ("minlength",),
    aten.clamp.default: ("max",),
    aten.one_hot.default: ("num_classes",),
    aten.arange.default: ("end",),
    aten.zeros.default: ("size",),
    aten.new_zeros.default: ("size",),
    **dict.fromkeys(
        (
            *(aten.ge.Scalar, aten.gt.Scalar, aten.lt.Scalar, aten.le.Scalar),
            *(aten.eq.Scalar, aten.ne.Scalar),
        ),
        ("other",),
    ),
}
