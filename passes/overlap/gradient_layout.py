"""Gradient layout: gradients of weights as their parameters lie in memory, so that none is copied.

Contract. In: a backward graph with dialect ops. Out: a gradient of experts' weights that is
transposed before it leaves the graph is computed transposed. transformers keeps weights as
``[E, out, in]`` and multiplies by their transpose; what autograd gets then has the strides of a
transpose, and it would copy that to the parameter's layout: a seventh of a layer's step.

Pseudo-code::

    transpose(grouped_mm_grad_weight(rows, grads), 1, 2) -> grouped_mm_grad_weight(grads, rows)

Rejects (left as they are): gradients that are also used as they are; other permutations.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_fx.compat import let_outputs_have_own_strides

log = logging.getLogger("moe_fx")

aten = torch.ops.aten
ops = torch.ops.moe_fx

_GRADIENTS = (ops.grouped_mm_grad_weight.default, ops.grouped_mm_grad_weight_sum.default)


def lay_out_gradients(graph: Graph) -> None:
    """Rewrite ``graph`` in place."""
    for node in list(graph.nodes):
        if not _transposes(node):
            continue
        (gradient,) = node.all_input_nodes
        if gradient.target not in _GRADIENTS:
            continue
        if len(gradient.users) > 1:
            log.info("%s is used transposed and as it is: autograd may copy it", gradient.name)
            continue
        rows, grads, offsets = gradient.args
        gradient.args = (grads, rows, offsets)
        gradient.meta["val"] = node.meta["val"].new_empty(node.meta["val"].shape)
        gradient.meta.pop("eager_input_vals", None)  # of the arguments that were
        node.replace_all_uses_with(gradient)
        let_outputs_have_own_strides(graph, gradient)
        graph.erase_node(node)


def _transposes(node: Node) -> bool:
    """The two inner dims of three."""
    if node.target is aten.permute.default:
        dims: Any = node.args[1]
        return len(dims) == 3 and [dim % 3 for dim in dims] == [0, 2, 1]
    if node.target is aten.transpose.int:
        inner: Any = node.args[1:]
        return node.meta["val"].dim() == 3 and {dim % 3 for dim in inner} == {1, 2}
    return False
