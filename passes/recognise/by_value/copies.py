"""Copies of one computation in a graph: the unrolled bodies of a loop over experts.

Contract. ``Copies(graph).of(num)`` yields, deepest first, lists of ``num`` nodes that compute the
same from their inputs, but for parameters, the position picked from a list or dim, and the number
compared with. ``paired`` walks two or more such nodes in lock step and says at which parameters
they differ.

Pseudo-code::

    colour of a node = (op, arguments, colours of its inputs); parameters by shape and dtype only,
                       numbers that tell copies apart left out
    nodes of one colour, exactly ``num`` of them -> copies
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from moe_fx.graph.nodes import value

aten = torch.ops.aten

_COUNTED = {aten.select.int: 2, aten.eq.Scalar: 1, operator.getitem: 1}
"""op -> position of the argument that counts copies."""


class Copies:
    def __init__(self, graph: Graph) -> None:
        self.colours: dict[Node, int] = {}
        self._numbers: dict[Any, int] = {}
        self.classes: dict[int, list[Node]] = defaultdict(list)
        for node in graph.nodes:
            colour = self._numbers.setdefault(self._key(node), len(self._numbers))
            self.colours[node] = colour
            self.classes[colour].append(node)

    def _key(self, node: Node) -> Any:
        if node.op in ("placeholder", "get_attr"):
            val = value(node)
            kind = (val.dtype, str(tuple(val.shape))) if isinstance(val, Tensor) else str(val)
            return node.op, kind
        args: Any = list(node.args)
        if node.target in _COUNTED and len(args) > _COUNTED[node.target]:
            args[_COUNTED[node.target]] = "#"
        args, kwargs = map_arg((tuple(args), node.kwargs), lambda n: _Colour(self.colours[n]))
        return node.op, node.target, repr(args), repr(kwargs)

    def of(self, num: int, first: Node, end: Node | None) -> Iterator[list[Node]]:
        """Floating tensors of matrices of rows, ``num`` alike, all behind ``first``: those that
        begin before ``end``, deepest first, then the others."""
        found = [
            nodes
            for nodes in self.classes.values()
            if len(nodes) == num and nodes[0].op == "call_function" and _is_rows(nodes[0])
        ]
        behind = [nodes for nodes in reversed(found) if first < nodes[0]]
        yield from sorted(behind, key=lambda nodes: end is not None and end < nodes[0])


@dataclass(frozen=True)
class Pairing:
    """differ: a parameter that the first copy reads -> those of all copies, or the one tensor that
    holds them along its first dim. inside: the nodes of the first copy."""

    differ: dict[Node, Node | tuple[Node, ...]] = field(default_factory=dict)
    inside: set[Node] = field(default_factory=set)


class _Colour(int):
    def __repr__(self) -> str:
        return f"%{int(self)}"


def _is_rows(node: Node) -> bool:
    val = value(node)
    return isinstance(val, Tensor) and val.dtype.is_floating_point and val.dim() > 1


def paired(
    copies: Sequence[Node], skip: Callable[[Node], bool], parameters: Callable[[Node], bool]
) -> Pairing | None:
    """Nodes for which ``skip`` holds are not walked. None if the copies differ in more than their
    parameters."""
    differ: dict[Node, Node | tuple[Node, ...]] = {}
    inside: set[Node] = set()
    seen: set[Node] = set()
    stack = [tuple(copies)]
    while stack:
        nodes = stack.pop()
        first = nodes[0]
        if first in seen or skip(first):
            continue
        seen.add(first)
        if all(node is first for node in nodes):
            continue
        inside.add(first)
        whole = _slices(nodes, parameters)
        if whole is not None:
            differ[first] = whole
        elif first.op != "call_function":
            if any(node.op != first.op for node in nodes):
                return None
            differ[first] = nodes
        elif parameters(first) and (first.target in _COUNTED or len(first.all_input_nodes) > 1):
            differ[first] = nodes  # computed from several parameters: as captured, for each expert
        else:
            inputs = [node.all_input_nodes for node in nodes]
            if len({node.target for node in nodes}) > 1 or len(set(map(len, inputs))) > 1:
                return None
            stack += zip(*inputs, strict=True)
    return Pairing(differ, inside)


def _slices(nodes: Sequence[Node], parameters: Callable[[Node], bool]) -> Node | None:
    """The tensor whose entries along dim 0, in order, the nodes are."""
    source: Any = nodes[0].args[0] if nodes[0].args else None
    for position, node in enumerate(nodes):
        if node.target is aten.select.int:
            if node.args != (source, 0, position):
                return None
        elif node.target is operator.getitem and getattr(source, "target", None) is (
            aten.unbind.int
        ):
            if node.args != (source, position) or (len(source.args) > 1 and source.args[1] != 0):
                return None
        else:
            return None
    if source.target is aten.unbind.int:
        source = source.args[0]
    return source if parameters(source) else None
