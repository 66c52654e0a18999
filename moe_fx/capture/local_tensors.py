"""Graphs with DTensor parameters that are only read as local tensors, as transformers' expert
parallelism reads them: the same graph of the local tensors.

AOT export has no tensor subclasses, and what a pass does to local shards is none of DTensor's
business: the conversion moves in front of the graph, where its gradient makes DTensors again.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.fx import GraphModule, Node

from moe_fx.capture.capture import NotFunctional
from moe_fx.compat import fake_with_numbers
from moe_fx.graph.copy import copy_graph
from moe_fx.region import Declined, source_of

__all__ = ["Localised", "localise"]


@dataclass(frozen=True)
class Localised:
    """module, inputs: without DTensors. positions: of the inputs that were DTensors."""

    module: GraphModule
    inputs: tuple[Any, ...]
    positions: frozenset[int]

    def wrap(self, compiled: Callable[..., Any]) -> Callable[..., Any]:
        """``compiled``, for the captured inputs."""
        if not self.positions:
            return compiled

        def run(*args: Any) -> Any:
            return compiled(
                *(a.to_local() if at in self.positions else a for at, a in enumerate(args))
            )

        return run


def localise(module: GraphModule, inputs: Sequence[Any]) -> Localised:
    """Raises `NotFunctional` if a DTensor is read in any other way."""
    positions = frozenset(at for at, value in enumerate(inputs) if isinstance(value, DTensor))
    if not positions:
        return Localised(module, tuple(inputs), positions)
    copy = copy_graph(module)
    local = list(inputs)
    for at, node in enumerate(copy.graph.find_nodes(op="placeholder")):
        if at not in positions:
            continue
        whole = inputs[at]
        local[at] = whole.to_local().detach().requires_grad_(whole.requires_grad)
        if isinstance(whole, nn.Parameter):  # and so what the graph reads is one, as passes ask
            local[at] = nn.Parameter(local[at].detach(), whole.requires_grad)
            local[at] = fake_with_numbers(local[at], inputs)
        for user in list(node.users):
            if not _reads_locally(user, node):
                reason = f"{user.target} works on a DTensor ({node.name}), not on its local tensor"
                raise NotFunctional(Declined(reason, user.name, source_of(user)))
            user.replace_all_uses_with(node, propagate_meta=False)
            copy.graph.erase_node(user)
        node.meta["example_value"] = local[at]
    copy.recompile()
    return Localised(copy, tuple(local), positions)


def _reads_locally(user: Node, node: Node) -> bool:
    if user.args != (node,) or user.kwargs:
        return False
    if user.op == "call_method":
        return user.target == "to_local"
    # Before torch 2.12 Dynamo calls a function instead, which holds the arguments.
    if user.op != "call_function" or getattr(user.target, "__name__", "") != "prim_to_local":
        return False
    assert inspect.isfunction(user.target)
    return not any(inspect.getclosurevars(user.target).nonlocals.values())
