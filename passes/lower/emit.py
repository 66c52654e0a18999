"""Adds ops to a graph, each with its fake value: what lowerings write with."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_fx.compat import FakeValues, traced


class Unmet(Exception):
    """An op can't be lowered; the message says why."""


class Emit:
    """Calls add nodes where the graph's insertion point is. like: the node whose source they take
    over."""

    def __init__(self, graph: Graph, values: FakeValues, like: Node) -> None:
        self.graph, self.values, self.like = graph, values, like
        self.added: list[Node] = []

    def __call__(self, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(op, args, kwargs)
        self.added.append(node)
        node.meta.update({k: v for k, v in self.like.meta.items() if k == "stack_trace"})
        self.values.compute(node)
        return node

    def undo(self, since: int = 0) -> None:
        """Take back what was added, but for the first ``since`` nodes."""
        for node in reversed(self.added[since:]):
            self.graph.erase_node(node)
        del self.added[since:]

    def inline(self, function: Callable[..., Any], *tensors: Node) -> Any:
        """The ATen calls that ``function`` makes of ``tensors``; the node(s) of its result."""
        module = traced(function, [value_of(node) for node in tensors])
        copies: dict[Node, Any] = {}
        given = iter(tensors)
        for node in module.graph.nodes:
            if node.op == "placeholder":
                copies[node] = next(given)
            elif node.op == "output":
                return map_arg(node.args[0], copies.__getitem__)
            else:
                args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
                copies[node] = self(node.target, *args, **kwargs)
        raise AssertionError("a traced graph has an output")

    def item(self, node: Node, index: int) -> Node:
        return self(operator.getitem, node, index)

    def size(self, node: Node, dim: int) -> Any:
        """A number where it is known, else a node."""
        size = value_of(node).shape[dim]
        return size if isinstance(size, int) else self(torch.ops.aten.sym_size.int, node, dim)

    def number(self, op: Callable[[Any, Any], Any], one: Any, other: Any) -> Any:
        """Of sizes: computed at once where both are known."""
        known = not isinstance(one, Node) and not isinstance(other, Node)
        return op(one, other) if known else self(op, one, other)

    def cast(self, node: Node, dtype: torch.dtype) -> Node:
        if value_of(node).dtype == dtype:
            return node
        return self(torch.ops.aten._to_copy.default, node, dtype=dtype)

    def flat(self, node: Node) -> Node:
        """``[n, ...] -> [n, m]``."""
        sizes = value_of(node).shape
        if len(sizes) == 2:
            return node
        rows, width = self.size(node, 0), math.prod(sizes[1:])
        return self(torch.ops.aten.reshape.default, node, [rows, width])


def value_of(node: Any) -> Any:
    """The fake value of a node; anything else as it is."""
    return node.meta["val"] if isinstance(node, Node) else node
