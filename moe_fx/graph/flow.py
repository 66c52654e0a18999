"""Which nodes of a graph come from which, and which top-k stands nearest above a node."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from moe_fx.graph.nodes import same, shape

aten = torch.ops.aten


class Flow:
    """What reads what in a graph."""

    def __init__(self, module: GraphModule) -> None:
        self.nodes = list(module.graph.nodes)
        self.position = {node: at for at, node in enumerate(self.nodes)}

    def calls(self, target: Any) -> Iterator[Node]:
        return (node for node in self.nodes if node.target is target)

    def above(self, *starts: Node) -> set[Node]:
        return closure(starts, lambda node: node.all_input_nodes)

    def below(self, *starts: Node) -> set[Node]:
        return closure(starts, lambda node: node.users)

    def ordered(self, nodes: Iterable[Node]) -> list[Node]:
        return sorted(nodes, key=self.position.__getitem__)

    def selection_above(self, node: Node) -> Node | None:
        """The last top-k over ``[T, E]`` that ``node`` comes from."""
        found = [
            n
            for n in self.ordered(self.above(node))
            if n.target is aten.topk.default and len(shape(n.args[0])) == 2
        ]
        return found[-1] if found else None

    def router_selections(self, select: Node) -> set[Node]:
        """``select`` and the group selections that its scores come from (not another layer's)."""
        leads = shape(select.args[0])[0]
        found, stack = {select}, list(select.all_input_nodes)
        while stack:
            node = stack.pop()
            if node in found or node.target in (aten.linear.default, aten.mm.default):
                continue
            if shape(node) and not same(shape(node)[0], leads):
                continue
            found.add(node)
            stack.extend(node.all_input_nodes)
        return {node for node in found if node.target is aten.topk.default}


def closure(starts: Iterable[Node], step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    """``starts`` and all that is reached from them by ``step``."""
    found, stack = set(starts), list(starts)
    while stack:
        for node in step(stack.pop()):
            if node not in found:
                found.add(node)
                stack.append(node)
    return found
