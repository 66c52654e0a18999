"""Splice: put what the passes made of a graph's copy into the graph itself, in place.

Contract. In: the caller's graph, the passes' result, and which of its nodes stand for nodes of the
caller's (``Context.origin``). Out: the caller's graph computes what the result computes, in the
result's order. Its own nodes stay, in the caller's spelling, wherever the result still needs them;
only what the passes added is new, spelled as Inductor's graphs are (`compat.decomposed`) and with
``meta["val"]``. Placeholders and outputs keep their places.

Pseudo-code::

    for each node of the result:
        stands for a node of the caller's, unchanged or reading only unchanged ones -> keep that
        else -> add it; its value is computed under the graph's fake mode; a size that turns out to
                be a number is that number
        place it, after those it needs, behind what has been placed
    erase what has not been placed

Rejects: nothing; it is not called for a graph in which nothing was found.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from moe_fx.compat import FakeValues, decomposed


def splice(graph: Graph, result: GraphModule, origin: dict[Node, Node]) -> None:
    splicer = _Splicer(graph, origin)
    for node in result.graph.nodes:
        splicer.add(node)
    splicer.erase_rest()
    graph.lint()


_KEPT_META = ("stack_trace", "nn_module_stack")


class _Splicer:
    def __init__(self, graph: Graph, origin: dict[Node, Node]) -> None:
        self.graph, self.origin = graph, origin
        self.values = FakeValues(graph)
        self.placed: dict[Node, None] = {}
        self.stands_for: dict[Node, Any] = {}
        self.end = graph.output_node()

    def add(self, node: Node) -> None:
        args, kwargs = map_arg((node.args, node.kwargs), self.stands_for.__getitem__)
        old = self.origin.get(node)
        if old is None:
            self.stands_for[node] = self._insert(node, args, kwargs)
        elif old.op != "call_function" or old.target is node.target:
            if (old.args, old.kwargs) != (args, kwargs):
                old.args, old.kwargs = args, kwargs
                old.meta["val"] = node.meta.get("val", old.meta.get("val"))
            self.stands_for[node] = old
        elif all(self.stands_for[n] is self.origin.get(n) for n in node.all_input_nodes):
            self.stands_for[node] = old
        else:
            self.stands_for[node] = self._insert(node, args, kwargs)
        if isinstance(self.stands_for[node], Node):
            self._place(self.stands_for[node])

    def _insert(self, node: Node, args: Any, kwargs: Any) -> Any:
        """The node, or the number, that stands for a node of the result."""
        added = self._create(node, args, kwargs, node)
        chain = decomposed(added) if isinstance(added, Node) else None
        if chain is None:
            return added
        inputs: list[Any] = added.all_input_nodes
        values = dict(zip(chain.graph.find_nodes(op="placeholder"), inputs, strict=True))
        for step in chain.graph.nodes:
            if step.op == "call_function":
                own = map_arg((step.args, step.kwargs), values.__getitem__)
                values[step] = self._create(step, *own, node)
        self.graph.erase_node(added)
        return values[chain.graph.output_node().args[0]]

    def _create(self, node: Node, args: Any, kwargs: Any, source: Node) -> Any:
        with self.graph.inserting_before(self.end):
            added = self.graph.create_node(node.op, node.target, args, kwargs)
        added.meta.update({k: source.meta[k] for k in _KEPT_META if k in source.meta})
        value = self.values.compute(added)
        if isinstance(value, int):
            self.graph.erase_node(added)
            return value
        return added

    def _place(self, node: Node) -> None:
        """Move ``node`` behind all that has been placed, after what it needs."""
        stack = [node]
        while stack:
            current = stack[-1]
            missing = [n for n in current.all_input_nodes if n not in self.placed]
            if missing:
                stack += missing
                continue
            stack.pop()
            if current not in self.placed:
                self.placed[current] = None
                if current is not self.end:
                    self.end.prepend(current)

    def erase_rest(self) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node not in self.placed:
                self.graph.erase_node(node)
