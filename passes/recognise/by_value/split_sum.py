"""A matmul that applies the experts' last matrices and sums their rows at once, as two ops.

``einsum("tef,efd->td", rows, table)`` sums over features *and* over experts; so does a ``matmul``
whose inner dim counts a token's slots. As a product that keeps experts or slots apart, and a sum,
the experts' rows are a node of the graph. The product is larger than what it replaces: `undo` it
where the region is not read after all.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from moe_fx.compat import FakeValues
from moe_fx.graph.contraction import contraction
from moe_fx.passes.recognise.by_value.rows.row_layout import RowLayout

aten = torch.ops.aten


class SplitSum:
    def __init__(self, node: Node, product: Node, summed: list[int]) -> None:
        self.node, self.product = node, product
        self._before = (node.target, node.args, node.kwargs)
        node.target, node.args, node.kwargs = aten.sum.dim_IntList, (product, summed), {}

    def undo(self) -> None:
        self.node.target, self.node.args, self.node.kwargs = self._before
        self.node.graph.erase_node(self.product)


def split_sum(node: Node, layout: RowLayout, values: FakeValues) -> SplitSum | None:
    """``node`` as a product and a sum over what tells rows apart; None if it is no such matmul."""
    found = contraction(node)
    if found is None or found.bias is not None:
        return None
    laid = [layout.laid.get(operand) for operand in found.operands]
    rows = next((at for at, x in enumerate(laid) if x is not None and x.kind == "rows"), None)
    if rows is None or laid[1 - rows] is None:
        return None
    one = laid[rows]
    assert one is not None
    apart = "".join(
        letter
        for letter, feature in zip(found.letters[rows], one.features, strict=True)
        if not feature and letter not in found.out and letter in found.letters[1 - rows]
    )
    if not apart:
        return None
    equation = f"{','.join(found.letters)}->{found.out}{apart}"
    operands: Any = list(found.operands)
    with node.graph.inserting_before(node):
        product = node.graph.call_function(aten.einsum.default, (equation, operands))
    product.meta = dict(node.meta)
    values.compute(product)
    summed = list(range(len(found.out), len(found.out) + len(apart)))
    return SplitSum(node, product, summed)
