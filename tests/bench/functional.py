"""Our graph with its exchanges as torch's functional collectives, which Inductor's own overlap
scheduler knows; it does not know an op of ours.

``torch.compile(..., options={"base": "functional_inductor"})`` after `register`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._dynamo import register_backend
from torch.fx import Graph, GraphModule, Node

from moe_fx.compat import base_compiler, resolve_group

BACKEND = "functional_inductor"
aten = torch.ops.aten
collectives = torch.ops._c10d_functional


def register() -> None:
    if BACKEND not in torch.compiler.list_backends(exclude_tags=()):
        register_backend(functional_inductor, name=BACKEND)


def functional_inductor(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    return base_compiler("inductor")(with_functional_exchanges(module), inputs)


def with_functional_exchanges(module: GraphModule) -> GraphModule:
    """``moe_fx.all_to_all`` and ``wait`` replaced; each count, read on the host, is a size."""
    sizes: dict[Node, list[Node]] = {}
    for wait in module.graph.find_nodes(op="call_function", target=torch.ops.moe_fx.wait.default):
        start = wait.args[0]
        rows, send, recv, group = start.args
        world = resolve_group(group).size()
        with module.graph.inserting_before(start):
            for counts in (send, recv):
                if counts not in sizes:
                    sizes[counts] = _on_host(module.graph, counts, world)
            splits = (sizes[recv], sizes[send], group)
            pending = module.graph.call_function(
                collectives.all_to_all_single.default, (rows, *splits)
            )
        with module.graph.inserting_before(wait):
            arrived = module.graph.call_function(collectives.wait_tensor.default, (pending,))
        wait.replace_all_uses_with(arrived)
        module.graph.erase_node(wait)
        if not start.users:
            module.graph.erase_node(start)
    module.graph.lint()
    module.recompile()
    return module


def _on_host(graph: Graph, counts: Node, world: int) -> list[Node]:
    found = []
    for rank in range(world):
        count = graph.call_function(aten.select.int, (counts, 0, rank))
        size = graph.call_function(aten.item.default, (count,))
        graph.call_function(torch.sym_constrain_range_for_size, (size,), {"min": 0})
        found.append(size)
    return found
