"""FuseRouter: scoring and selection -> ``gating_top_k``, for devices that have an op for it.

Contract. In: verified regions whose router's description gave the captured weights and ids by value
(`router.py`). Out: the same graph with weights and ids from ``gating_top_k`` and what follows from
the description. For graphs that are not differentiated: the op has no gradients.

Pseudo-code::

    weights, ids = gating_top_k(logits, bias, groups)
    renormalise over the selected (a sigmoid's are already; a softmax over the selected logits is a
        softmax over all, renormalised);  times scale
    captured weights, ids -> these

Leaves alone, as captured: scores other than softmax and sigmoid, sigmoids that are not
renormalised, factors from parameters, experts among the logits that are none.
"""

from __future__ import annotations

import operator
from dataclasses import replace

import torch
from torch.fx import GraphModule, Node

from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.roles import shape, value
from moe_fx.region import Region, Router

aten = torch.ops.aten
ops = torch.ops.moe_fx

_EPS = 1e-20


class FuseRouter(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        if not context.fuses_routers or context.training:
            return PassResult(module, changed=False)
        fitting = [_fits(region) for region in context.regions]
        context.regions = [
            _fused(region, module) if fits else region
            for region, fits in zip(context.regions, fitting, strict=True)
        ]
        return PassResult(module, any(fitting))


def _fits(region: Region) -> bool:
    parts, router = region.parts, region.router
    if parts.gate is None or parts.weights is None or not router.verified:
        return False
    plain = Router(
        score=router.score,
        select_bias=router.select_bias,
        num_groups=router.num_groups,
        topk_group=router.topk_group,
        renormalise=router.renormalise,
        scale=router.scale,
        softmax_after_topk=router.softmax_after_topk,
        verified=True,
    )
    scored = router.score == "softmax" or (router.score == "sigmoid" and router.renormalise)
    shapes = [len(shape(node)) for node in (parts.gate.logits, parts.weights, parts.ids)]
    return router == plain and scored and shapes == [2, 2, 2]


def _fused(region: Region, module: GraphModule) -> Region:
    parts, router = region.parts, region.router
    assert parts.gate is not None and parts.weights is not None
    graph = module.graph
    sigmoid = router.score == "sigmoid"
    with graph.inserting_before(parts.select):
        gated = graph.call_function(
            ops.gating_top_k.default,
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
