"""Copies of FX graphs: the same nodes in the same order, with their names and meta."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule


def copy_graph(module: GraphModule) -> GraphModule:
    return GraphModule(module, copy_of(module.graph))


def copy_of(original: Graph) -> Graph:
    graph = Graph()
    copied: Any = graph.graph_copy(original, {}, return_output_node=True)
    value, old_output = copied
    graph.output(value).meta = dict(old_output.meta)
    return graph
