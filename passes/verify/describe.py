"""Describe: a region's nodes as text, before the rewrite takes them away.

Contract. In: planned regions. Out: the same regions, each with a `Listing`. The graph is not
changed. Relies on little: ``parts.nodes``, and of the other parts those that a form has.

Pseudo-code, for one region::

    router     = from ids and weights back to the tokens, or to the matmul that scores them
    experts    = parts.body but for dispatched rows;  combine = parts.post, weights and the result
    dispatch   = the others
    after      = the replacement that verification runs, for this rank
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from moe_fx.graph.nodes import value
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.evaluate.extract import extract_region
from moe_fx.passes.roles import PairWeights
from moe_fx.passes.verify.verify import replacement
from moe_fx.plan import ExchangePlan
from moe_fx.region import Listing, Region, Step, source_of
from moe_fx.report.naming import common_module, parameter_names

aten = torch.ops.aten

_SCORING = (aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default)
_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}


class Describe(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        position = {node: at for at, node in enumerate(module.graph.nodes)}
        context.regions = [
            replace(
                region,
                listing=listing(region, plan, position.__getitem__),
                module=_module(region),
                weights=parameter_names(getattr(region.parts, "tables", ())),
            )
            for region, plan in zip(context.regions, context.plans, strict=True)
        ]
        return PassResult(module, changed=False)


def _module(region: Region) -> str:
    parts = region.parts
    return common_module([parts.select, *(parts.captured or [parts.combined])])


def listing(region: Region, plan: ExchangePlan, position: Callable[[Node], int]) -> Listing:
    part_of = _parts(region)
    before = [_step(node, part_of[node]) for node in sorted(part_of, key=position)]
    after = replacement(*extract_region(region), plan)
    called = [node for node in after.graph.nodes if node.op == "call_function"]
    return Listing(tuple(before), tuple(_step(node, "") for node in called))


def _parts(region: Region) -> dict[Node, str]:
    parts = region.parts
    if parts.captured:
        return parts.captured
    part_of = dict.fromkeys(_router(region), "router") | dict.fromkeys(parts.nodes, "dispatch")
    moved = set(getattr(parts, "dispatched", ()))
    part_of |= {n: "experts" for n in getattr(parts, "body", ()) if n not in moved}
    weights = [n for n, role in _roles(region).items() if isinstance(role, PairWeights)]
    combining = [*weights, *getattr(parts, "post", ()), parts.combined]
    return part_of | {node: "combine" for node in combining if node in part_of}


def _roles(region: Region) -> dict[Node, object]:
    return getattr(region.parts, "roles", {})


def _router(region: Region) -> Iterable[Node]:
    parts = region.parts
    found: dict[Node, None] = {}
    inside = set(parts.nodes)
    stack = [n for n in (parts.select, parts.ids, parts.weights) if n is not None]
    while stack:
        node = stack.pop()
        if node.op != "call_function" or node is parts.tokens or node in inside or node in found:
            continue
        found[node] = None
        if node.target not in _SCORING:
            stack.extend(node.all_input_nodes)
    return found


def _step(node: Node, part: str) -> Step:
    return Step(
        part=part,
        name=node.name,
        op=_op_name(node),
        inputs=tuple(source.name for source in node.all_input_nodes),
        shape=_shape(node),
        source=source_of(node),
    )


def _op_name(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))


def _shape(node: Node) -> str:
    val = value(node)
    if not isinstance(val, Tensor):
        return ""
    dtype = _DTYPES.get(val.dtype, str(val.dtype).removeprefix("torch."))
    return f"{dtype}[{', '.join(map(str, val.shape))}]"
