"""What an anchor may select, and which nodes hold the selected experts: for reading by value."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.graph.nodes import argument, is_integer, shape, value
from moe_fx.graph.refusal import Refusal
from moe_fx.graph.selectors import is_lookup_of_ids
from moe_fx.passes.recognise.anchors import Anchor
from moe_fx.passes.recognise.by_value.samples import Ids
from moe_fx.passes.recognise.by_value.surroundings import inner_selectors
from moe_fx.passes.recognise.selection import select
from moe_fx.passes.roles import Selection

aten = torch.ops.aten


def selections(anchor: Anchor) -> list[Selection]:
    """What the anchor may select: of as many experts as there are scores, or as something that it
    indexes has entries. Several selections of one expert each, one after the other, (GShard's two
    argmaxes) select that many."""
    selection = select(anchor)
    singles = [n for n in inner_selectors(selection) if n.target in _SINGLE]
    if len(singles) > 1 and all(n.target in _SINGLE for n in anchor.selectors):
        selection = replace(selection, top_k=len(singles), selectors=tuple(singles), distinct=False)
    found = [selection]
    if selection.columns not in (0, selection.num_experts):
        found.insert(0, replace(selection, num_experts=selection.columns))
    return found


_SINGLE = (aten.max.dim, aten.argmax.default)


def ids_of(anchor: Anchor, selection: Selection) -> Ids:
    """The nodes that hold the selected experts, ``[T, K]`` in one or ``[T, 1]`` each."""
    node = anchor.ids
    if node is not None and is_integer(node) and _columns(node, selection) == selection.top_k:
        return Ids((node,))
    found: list[Node] = []
    for selector in selection.selectors:
        if isinstance(value(selector), Tensor) or is_lookup_of_ids(selector):
            found.append(selector)
        else:
            found += [n for n in selector.users if argument(n, 1, "index") == 1]
    if sum(_columns(n, selection) for n in found) != selection.top_k:
        raise Refusal("the selected ids are not one matrix", anchor.node, 1)
    return Ids(tuple(found))


def some_experts(ids: Ids, selection: Selection) -> Refusal | None:
    """Why the experts of a loop are not all there, or not alike: the ids are compared with some of
    them only, or with all."""
    compared: set[int] = set()
    columns: set[Node] = set()
    found, stack = set(ids.nodes), list(ids.nodes)
    while stack:
        current = stack.pop()
        for user in current.users:
            if user.target is aten.eq.Scalar and isinstance(user.args[1], int):
                compared.add(user.args[1])
                if _columns(current, selection) == 1:
                    columns.add(current)
            elif user not in found and is_integer(user):
                found.add(user)
                stack.append(user)
    num = selection.num_experts
    experts = set(range(num)) if isinstance(num, int) else set()
    missing, compared = sorted(experts - compared), compared & experts
    if len(compared) < 2 or (not missing and selection.looked_up):
        return None  # the caller's refusal says what there is to say
    if not missing and selection.top_k > 1 and len(columns) > 1:
        reason = (
            f"each of a token's {selection.top_k} selections is compared with the {num} experts by "
            "itself: run an expert once, on all tokens that selected it"
        )
        return Refusal(reason, selection.node, 3)
    if not missing:
        reason = f"the {num} experts do not all compute the same on the tokens, each with its own"
        return Refusal(f"{reason} parameters", selection.node, 3)
    names = ", ".join(map(str, missing))
    return Refusal(
        f"the selected ids are compared with {len(compared)} of {num} experts, never with {names}",
        selection.node,
        3,
    )


def _columns(node: Node, selection: Selection) -> int:
    dims, lead = shape(node), selection.lead
    if len(dims) == len(lead):
        return 1
    last = dims[-1]
    return last if isinstance(last, int) else 0
