"""What an anchor selects: so many of so many experts for each token.

Contract. ``select`` turns an `Anchor` into the `Selection` the rules speak of, or raises `Refusal`
saying why it is none: scores over another dim, the lowest scores, sizes that are not constant, or a
table of ids that is known to hold some of no expert.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Node

from moe_fx.graph.nodes import ELEMENTWISE_COPIES, argument, shape, tensor_inputs
from moe_fx.graph.refusal import Refusal
from moe_fx.graph.selectors import LOOKUPS, SELECTS, dim_of, is_lookup_of_ids
from moe_fx.passes.evaluate.typical import constant_of
from moe_fx.passes.recognise.anchors import EXACT, Anchor
from moe_fx.passes.roles import Selection

aten = torch.ops.aten


def select(anchor: Anchor) -> Selection:
    """The `Selection` an anchor stands for; raises `Refusal` if it can't be one over experts."""
    node = anchor.node
    if is_lookup_of_ids(node) or node.target not in SELECTS:
        return _looked_up(anchor)
    dims = shape(node.args[0])
    if len(dims) < 2:
        raise Refusal(f"the selection is over {list(dims)}, expected [tokens, experts]", node)
    if dim_of(node) % len(dims) != len(dims) - 1:
        if dim_of(node) % len(dims) == 0:
            raise Refusal("the selection picks tokens (dim 0), not experts", node)
        raise Refusal(
            f"the selection is over dim {dim_of(node)} of {list(dims)}, not the last", node
        )
    if node.target is aten.topk.default and not argument(node, 3, "largest", True):
        raise Refusal("the selection takes the lowest scores", node)
    columns, k = dims[-1], _selected(anchor)
    if not isinstance(k, int) or not isinstance(columns, int):
        raise Refusal("the number of experts or of selected experts is not a constant", node)
    experts = columns if anchor.exact or anchor.experts is None else anchor.experts
    return Selection(
        node,
        math.prod(dims[:-1]),
        experts,
        k,
        selectors=anchor.selectors,
        lead=dims[:-1],
        columns=columns,
        exact=anchor.exact,
        distinct=k == 1 or (anchor.exact and len(anchor.selectors) == 1),
    )


def holds_selected(ids: Node, selection: Selection) -> bool:
    """Whether the entries of ``ids`` are indices that were selected, untouched."""
    stack = [ids]
    while stack:
        node = stack.pop()
        if node in selection.selectors:
            continue
        if node.target is operator.getitem and node.args[0] in selection.selectors:
            if node.args[1] != 1:
                return False
            continue
        if node.target not in EXACT:
            return False
        stack += tensor_inputs(node)
    return True


def _looked_up(anchor: Anchor) -> Selection:
    """Experts given from outside: by a table of token ids, or as an input of the model."""
    node = anchor.node
    looked_up = is_lookup_of_ids(node)
    dims = shape(node)
    k = _selected(anchor)
    if anchor.experts is None or not isinstance(k, int):
        raise Refusal("the graph does not say how many experts the ids are of", node)
    _check_known_ids(node, anchor.experts)
    weighed = len(anchor.selectors) > 1 and node.op == "placeholder"
    lead = dims[:-1] if (looked_up or weighed) and len(dims) > 1 else dims
    return Selection(
        node,
        math.prod(lead),
        anchor.experts,
        k,
        selectors=anchor.selectors,
        lead=lead,
        exact=anchor.exact,
        distinct=k == 1,
        looked_up=True,
    )


def _check_known_ids(node: Node, experts: int) -> None:
    """Where the ids, or the table that they are looked up in, are known: they must be experts'."""
    table: Any = node.args[LOOKUPS[node.target][0]] if is_lookup_of_ids(node) else node
    while isinstance(table, Node) and table.target in ELEMENTWISE_COPIES:
        table = table.args[0]
    known = constant_of(table) if table.op == "get_attr" else table.meta.get("real")
    if (
        known is not None
        and known.numel()
        and not 0 <= int(known.min()) <= int(known.max()) < experts
    ):
        raise Refusal(
            f"{table} holds ids from {int(known.min())} to {int(known.max())}, and there are "
            f"{experts} experts",
            node,
            5,
        )


def _selected(anchor: Anchor) -> Any:
    """K: the last dim of the ids' matrix. A vector of ids is one of K = 1."""
    node = anchor.ids if anchor.ids is not None and not _is_one_topk(anchor) else anchor.node
    if node.target is aten.topk.default:
        return argument(node, 1, "k")
    given = node.target not in SELECTS and not is_lookup_of_ids(node)
    if given and node is anchor.node and len(anchor.selectors) == 1:
        return 1
    dims = shape(node)
    return dims[-1] if len(dims) > 1 else 1


def _is_one_topk(anchor: Anchor) -> bool:
    return anchor.selectors == (anchor.node,) and anchor.node.target is aten.topk.default
