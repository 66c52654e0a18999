"""Rows travel in the dtype that their experts compute in, where that is the narrower one.

Under autocast tokens are float32 and the experts' matmuls cast them to bfloat16. Captured, the cast
stands behind the dispatch, where rows are on their experts' side already. It is done before they
travel instead, and one at the end of the body, back to float32, after they have come back. No bit
of the results changes, as rows are only copied on their way. A row's gradient travels in its dtype:
where one cast reads the row, it has that dtype anyway; the gradients of several are rounded after
they are added.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.graph.nodes import VIEWS, value
from moe_fx.passes.roles import Permutation, Rows
from moe_fx.region import Parts

aten = torch.ops.aten
_CAST = aten._to_copy.default
_RESHAPES = {*VIEWS, aten.unsqueeze.default, aten.squeeze.dim, aten.alias.default}


@dataclass(frozen=True)
class Narrow:
    """casts: those of the body that every row meets first, all to one dtype; they are done before
    rows travel. widens: a cast, the last of the body; it is done when they are back."""

    casts: tuple[Node, ...] = ()
    widens: Node | None = None


def narrow(parts: Parts) -> Narrow:
    widens = parts.cut if _changes_width(parts.cut, wider=True) else None
    return Narrow(_first_casts(parts), widens)


def _first_casts(parts: Parts) -> tuple[Node, ...]:
    """None of them if a row meets anything else first."""
    casts: dict[Node, None] = {}
    body = set(parts.body)
    reached = list(parts.dispatched)
    while reached:
        node = reached.pop()
        if node is parts.cut:
            return ()
        for user in node.users:
            if user not in body or user in parts.dispatched:
                continue
            if not isinstance(parts.roles[user], Rows):
                continue
            if _changes_width(user, wider=False):
                casts[user] = None
            elif user.target in _RESHAPES or is_permuting(parts, user):
                reached.append(user)
            else:
                return ()
    return tuple(casts) if len({value(cast).dtype for cast in casts}) == 1 else ()


def is_permuting(parts: Parts, node: Node) -> bool:
    """Whether ``node`` puts rows in another order."""
    index: Any
    if node.target is aten.index.Tensor:
        indices: Any = node.args[1]
        (index,) = indices
    elif node.target is aten.index_select.default:
        index = node.args[2]
    else:
        return False
    return isinstance(parts.roles.get(index), Permutation)


def _changes_width(node: Node, wider: bool) -> bool:
    """Whether ``node`` does nothing but cast, to a floating dtype that is wider, or narrower."""
    if node.target is not _CAST or node.kwargs.keys() != {"dtype"}:
        return False
    before, after = value(node.args[0]), value(node)
    if not (
        isinstance(before, Tensor) and before.is_floating_point() and after.is_floating_point()
    ):
        return False
    small, large = (before, after) if wider else (after, before)
    return bool(small.dtype.itemsize < large.dtype.itemsize)
