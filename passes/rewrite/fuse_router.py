"""FuseRouter: scoring and selection -> ``gating_top_k``, for devices that have an op for it.

Contract. In: verified regions whose router's description gave the captured weights and ids by value
(`router.py`). Out: the same graph with weights and ids from ``gating_top_k`` and what follows from
the description. Graphs that are differentiated get ``gating_top_k_training``, the same op with
gradients, where the device is one that gains by it.

Pseudo-code::

    weights, ids = gating_top_k(logits, bias, groups)
    renormalise over the selected (a sigmoid's are already; a softmax over the selected logits is a
        softmax over all, renormalised);  times scale
    captured weights, ids -> these

Leaves alone, as captured: scores other than softmax and sigmoid, sigmoids that are not
renormalised, factors from parameters, experts among the logits that are none; the report says why.
"""

from __future__ import annotations

import operator
from dataclasses import fields, replace

import torch
from torch.fx import GraphModule, Node

from moe_fx.graph.nodes import shape, value
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.region import Lowered, Region, Router

aten = torch.ops.aten
ops = torch.ops.moe_fx

_EPS = 1e-20


class FuseRouter(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        device = context.device
        if not (device.trains_routers if context.training else device.fuses_routers):
            return PassResult(module, changed=False)
        changed = False
        for at, region in enumerate(context.regions):
            reason = _misfit(region)
            if reason:
                kept = Lowered("router", (), region.parts.select.name, region.source, reason)
                context.report.lowered.append(kept)
            else:
                context.regions[at] = _fused(region, module, context.training)
                changed = True
        return PassResult(module, changed)


def _misfit(region: Region) -> str:
    parts, router = region.parts, region.router
    if parts.weights is None or not router.verified:
        return router.note or "the captured weights and ids were not reproduced"
    if parts.gate is None:
        return "experts of groups that are not selected may be selected where others score below 0"
    if router.score not in ("softmax", "sigmoid"):
        return f"the score is {router.score!r}, not softmax or sigmoid"
    if router.score == "sigmoid" and not router.renormalise:
        return "sigmoid scores are not renormalised"
    others = [name for name, value in _DEFAULTS.items() if getattr(router, name) != value]
    if others:
        return f"no op has this router's {', '.join(others)}"
    if [len(shape(node)) for node in (parts.gate.logits, parts.weights, parts.ids)] != [2, 2, 2]:
        return "logits, weights or ids have more than two dimensions"
    return ""


_TAKEN = (
    "score",
    "select_bias",
    "num_groups",
    "topk_group",
    "renormalise",
    "scale",
    "softmax_after_topk",
    "verified",
)
_DEFAULTS = {f.name: f.default for f in fields(Router) if f.name not in _TAKEN}
"""Fields of a router that the op has nothing for."""


def _fused(region: Region, module: GraphModule, training: bool) -> Region:
    parts, router = region.parts, region.router
    assert parts.gate is not None and parts.weights is not None
    graph = module.graph
    sigmoid = router.score == "sigmoid"
    with graph.inserting_before(parts.select):
        gated = graph.call_function(
            ops.gating_top_k_training.default if training else ops.gating_top_k.default,
            (
                parts.gate.logits,
                region.top_k,
                router.score,
                parts.gate.bias if router.select_bias else None,
                router.num_groups,
                router.topk_group,
                parts.gate.group_score,
                _EPS,
                router.scale if sigmoid else 1.0,
            ),
        )
        weights = graph.call_function(operator.getitem, (gated, 0))
        ids = graph.call_function(operator.getitem, (gated, 1))
        if not sigmoid and (router.renormalise or router.softmax_after_topk):
            total = graph.call_function(aten.sum.dim_IntList, (weights, [-1], True))
            weights = graph.call_function(aten.div.Tensor, (weights, total))
        if not sigmoid and router.scale != 1.0:
            weights = graph.call_function(aten.mul.Tensor, (weights, router.scale))
        weights, ids = (
            _as(node, captured) for node, captured in ((weights, parts.weights), (ids, parts.ids))
        )
    for node in [gated, *gated.users]:
        node.meta.setdefault("stack_trace", parts.select.meta.get("stack_trace", ""))
    for captured, fused in ((parts.weights, weights), (parts.ids, ids)):
        captured.replace_all_uses_with(fused, propagate_meta=False)
        parts.roles[fused] = parts.roles[captured]
    return replace(region, parts=replace(parts, weights=weights, ids=ids))


def _as(node: Node, captured: Node) -> Node:
    cast = node.graph.call_function(
        aten._to_copy.default, (node,), {"dtype": value(captured).dtype}
    )
    cast.meta.update(captured.meta)
    return cast
