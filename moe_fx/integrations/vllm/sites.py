"""The MoE layers of a graph that vLLM compiles, in the two forms that they have there.

- *opaque*: ``vllm.moe_forward`` and ``vllm.moe_forward_shared``, whole layers in one op;
- *inlined*: ``_C.cpu_fused_moe`` with the router and the shared expert around it (on CPUs).

Both may stand in an ``auto_functionalized`` node, as an op that writes to an argument does.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_fx.integrations.vllm.layout import Layout, Unsupported

_FUNCTIONALIZED = torch.ops.higher_order.auto_functionalized
_FUNCTIONALIZED_V2 = torch.ops.higher_order.auto_functionalized_v2


@dataclass(frozen=True)
class Site:
    """One layer. arguments: of its op, by name; results: the nodes that read its results, each with
    which it is: "routed", "shared", or the name of the argument that was written to."""

    node: Node
    op: Any
    arguments: dict[str, Any]
    results: dict[Node, str] = field(default_factory=dict)

    @property
    def opaque(self) -> bool:
        return self.op is not _cpu_fused_moe()

    @property
    def tokens(self) -> Node:
        tokens: Node = self.arguments["hidden_states" if self.opaque else "input"]
        return tokens

    def check(self, layout: Layout) -> None:
        """Raises `Unsupported` for a layer that is not what the configuration says."""
        value = self.tokens.meta["val"]
        if value.dim() != 2 or value.shape[1] != layout.hidden:
            raise Unsupported(
                f"tokens are {tuple(value.shape)}, the layers take [T, {layout.hidden}]"
            )
        if self.opaque:
            if self.arguments["hidden_dim_unpadded"] != 0:
                raise Unsupported("its kernel writes fewer features than it reads")
            return
        experts = self.arguments["w13"].meta["val"].shape[0]
        if experts != layout.local_experts:
            raise Unsupported(
                f"its weights are of {experts} experts, a rank has {layout.local_experts}"
            )


def _cpu_fused_moe() -> Any:
    """None where vLLM has no kernels for CPUs."""
    return getattr(getattr(torch.ops._C, "cpu_fused_moe", None), "default", None)


def sites(graph: Graph) -> Iterator[Site]:
    """In graph order. Raises `Unsupported` for a spelling that is not known."""
    known = {
        torch.ops.vllm.moe_forward.default,
        torch.ops.vllm.moe_forward_shared.default,
        _cpu_fused_moe(),
    }
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        functionalized = node.target is _FUNCTIONALIZED
        op = node.args[0] if functionalized or node.target is _FUNCTIONALIZED_V2 else node.target
        if op not in known or op is None:
            continue
        if node.target is _FUNCTIONALIZED_V2:
            raise Unsupported(
                "its op is spelled auto_functionalized_v2; leave inductor_compile_config's "
                "enable_auto_functionalized_v2 off, as vLLM does"
            )
        yield _site(node, op, functionalized)


def _site(node: Node, op: Any, functionalized: bool) -> Site:
    schema = op._schema
    arguments = {each.name: each.default_value for each in schema.arguments}
    given = node.args[1:] if functionalized else node.args
    arguments |= {each.name: value for each, value in zip(schema.arguments, given, strict=False)}
    arguments |= node.kwargs
    routed = ["routed"] if len(schema.returns) == 1 else ["shared", "routed"]
    returns = [] if not schema.returns else routed
    if not functionalized:
        if len(returns) == 1:
            return Site(node, op, arguments, {node: "routed"})
        return Site(node, op, arguments, _items(node, returns))
    written = [each.name for each in schema.arguments if each.is_write]
    return Site(node, op, arguments, _items(node, [*(returns or [""]), *written]))


def _items(node: Node, names: list[str]) -> dict[Node, str]:
    found = {}
    for user in node.users:
        if user.target is not operator.getitem:
            raise Unsupported(f"its results are read whole, by {user.format_node()}")
        found[user] = names[user.args[1]]  # type: ignore[index]
    return found
