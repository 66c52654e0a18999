"""Inference mode inside a graph, as a stretch without gradients.

A pre-dispatch trace keeps ``torch.no_grad`` as nodes of its graph, but not `torch.inference_mode`:
gradients would flow through what the model computes under it.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule

from moe_fx.compat import INFERENCE_MODE
from moe_fx.graph.copy import copy_graph

__all__ = ["without_inference_mode"]


def without_inference_mode(module: GraphModule) -> GraphModule:
    """A copy of Dynamo's graph in which gradients are off wherever inference mode was on; the graph
    itself if it never is."""
    enter, leave = INFERENCE_MODE
    switches = (enter, leave, torch._C._set_grad_enabled)
    if not module.graph.find_nodes(op="call_function", target=enter):
        return module
    copy = copy_graph(module)
    enabled, outer = torch.is_grad_enabled(), []
    for node in [n for n in copy.graph.nodes if n.op == "call_function" and n.target in switches]:
        if node.target is enter:
            outer.append(enabled)
            enabled = not node.args[0]
        elif node.target is leave:
            enabled = outer.pop()
        else:
            enabled = bool(node.args[0])
            continue
        node.target, node.args = torch._C._set_grad_enabled, (enabled,)
    copy.recompile()
    return copy
