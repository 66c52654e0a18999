"""Whether experts choose their tokens (expert choice, Zhou et al. 2022, arXiv:2202.09368).

There each expert takes the tokens that score highest for it, so that a token may meet any number of
experts. moe_fx rewrites layers in which tokens choose; this tells such a layer from a selection of
tokens that has nothing to do with experts, so that its decline is reported as a missed layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.graph.flow import closure
from moe_fx.graph.nodes import same, shape, value
from moe_fx.graph.selectors import SELECTS, dim_of

aten = torch.ops.aten

_PUTS_BACK: tuple[Any, ...] = (
    aten.index_add.default,
    aten.index_put.default,
    aten.scatter_add.default,
    aten.scatter_reduce.two,
    aten.one_hot.default,
)
_MULTIPLIES: tuple[Any, ...] = (aten.bmm.default, aten.matmul.default, aten.einsum.default)

REASON = (
    "experts choose their tokens here (expert choice): each takes the tokens that score highest "
    "for it. Only layers in which each token chooses its experts are rewritten"
)


def experts_choose(selector: Node) -> bool:
    """Whether ``selector`` picks tokens for each expert: along the dim of its scores that counts
    tokens, where what is picked meets a matrix per entry of the other dim, and is put back by the
    picked indices."""
    if selector.target not in SELECTS:
        return False
    dims = shape(selector.args[0])
    along = dim_of(selector)
    if len(dims) < 2 or not isinstance(along, int):
        return False
    experts = dims[-2] if along % len(dims) == len(dims) - 1 else dims[-1]
    below = closure([selector], lambda node: node.users)
    read = any(_reads_a_matrix_of_each(node, experts, below) for node in below)
    return read and any(node.target in _PUTS_BACK for node in below)


def _reads_a_matrix_of_each(node: Node, experts: Any, below: set[Node]) -> bool:
    return node.target in _MULTIPLIES and any(
        isinstance(value(table), Tensor)
        and len(shape(table)) == 3
        and same(shape(table)[0], experts)
        and _comes_from_inputs_alone(table)
        for table in node.all_input_nodes
        if table not in below
    )


def _comes_from_inputs_alone(table: Node) -> bool:
    """A parameter, seen another way: nothing but views and casts of one input."""
    above = closure([table], lambda node: node.all_input_nodes)
    return sum(node.op in ("placeholder", "get_attr") for node in above) == 1
