"""Normalise: one spelling for things that have several.

Contract: works on a copy, so a graph in which nothing is found leaves as it came. Computes the
same values. Afterwards recognisers meet one op per meaning for casts and transposes, and no
metadata assertions (they would keep replaced nodes alive).

Pseudo-code::

    copy the graph
    for node: erase it if it is a metadata assertion, else apply SPELLINGS[node.target]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from moe_fx.passes.base import Context, Pass, PassResult

aten = torch.ops.aten

_ASSERTIONS = (aten._assert_tensor_metadata.default,)


def _type_as(node: Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return aten._to_copy.default, (node.args[0],), {"dtype": node.meta["val"].dtype}


def _convert_element_type(node: Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return aten._to_copy.default, (node.args[0],), {"dtype": node.args[1]}


def _t(node: Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    return aten.transpose.int, (node.args[0], 0, 1), {}


def _floor_div(node: Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    if node.kwargs.get("rounding_mode") != "floor":
        return None
    return aten.floor_divide.default, node.args, {}


SPELLINGS: dict[Any, Callable[[Node], tuple[Any, tuple[Any, ...], dict[str, Any]] | None]] = {
    aten.type_as.default: _type_as,
    torch.ops.prims.convert_element_type.default: _convert_element_type,
    aten.t.default: _t,
    aten.div.Tensor_mode: _floor_div,
    aten.div.Scalar_mode: _floor_div,
}


def copy_graph(module: GraphModule) -> GraphModule:
    return GraphModule(module, _copy(module.graph))


def _copy(original: Graph) -> Graph:
    graph = Graph()
    copied: Any = graph.graph_copy(original, {}, return_output_node=True)
    value, old_output = copied
    graph.output(value).meta = dict(old_output.meta)
    return graph


class Normalise(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        graph = _copy(module.graph)
        for node in list(graph.nodes):
            if node.target in _ASSERTIONS:
                graph.erase_node(node)
            elif node.op == "call_function" and node.target in SPELLINGS:
                spelling = SPELLINGS[node.target](node)
                if spelling is not None:
                    node.target, node.args, node.kwargs = spelling
        return PassResult(GraphModule(module, graph), changed=True)
