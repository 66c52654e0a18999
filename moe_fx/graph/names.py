"""What a person would call the parts of a region, for the report: activation, shared expert."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import Node

from moe_fx.graph.nodes import ELEMENTWISE_COPIES, VIEWS, shape, tensor_inputs

aten = torch.ops.aten

_MATMULS = (aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default)
_SEARCH_LIMIT = 200


def activation_name(body: Iterable[Node]) -> str:
    """ "silu", "gelu", "relu", "relu2", "clamped_swiglu" or "custom"."""
    ops = {node.target for node in body}
    if aten.silu.default in ops:
        return "clamped_swiglu" if aten.clamp.default in ops else "silu"
    if aten.clamp.default in ops and aten.sigmoid.default in ops:
        return "clamped_swiglu"
    if aten.relu.default in ops:
        squared = aten.square.default in ops or aten.pow.Tensor_Scalar in ops
        return "relu2" if squared else "relu"
    return "gelu" if aten.gelu.default in ops else "custom"


def has_shared_expert(combined: Node, tokens: Node, base: Node | None = None) -> bool:
    """Whether the combined rows are added to another matmul result of the same tokens, ``base``
    or a later one."""
    if base is not None and _matmuls_of(base, view_root(tokens)):
        return True
    return bool(shared_matmuls(combined, tokens))


def shared_matmuls(combined: Node, tokens: Node) -> tuple[Node, ...]:
    """Those of the same tokens whose result the combined rows are added to."""
    node = combined
    while len(node.users) == 1:
        (user,) = node.users
        if user.target is aten.add.Tensor:
            others = [n for n in user.all_input_nodes if n is not node]
            return _matmuls_of(others[0], view_root(tokens)) if len(others) == 1 else ()
        if user.target not in (*VIEWS, *ELEMENTWISE_COPIES, aten.mul.Tensor):
            return ()
        node = user
    return ()


def view_root(node: Node) -> Node:
    while node.target in VIEWS:
        source = node.args[0]
        assert isinstance(source, Node)
        node = source
    return node


def _matmuls_of(node: Node, tokens: Node) -> tuple[Node, ...]:
    """The matmuls on paths up from ``node``, if all end in ``tokens`` or a parameter."""
    found: list[Node] = []
    seen, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if view_root(current) is tokens:
            continue
        if len(seen) > _SEARCH_LIMIT or (current.op == "placeholder" and len(shape(current)) > 2):
            return ()
        if current.target in _MATMULS:
            found.append(current)
        for source in tensor_inputs(current):
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return tuple(reversed(found)) if any(view_root(n) is tokens for n in seen) else ()
