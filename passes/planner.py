"""Plan: how each region's tokens reach their experts.

Contract. In: recognised regions. Out: one `ExchangePlan` per region, the same on every rank but for
the rank number. Raises `ConfigurationError` if the experts do not divide by the group.

Pseudo-code::

    group = the gather's group if the weights are gathered, else the option's
    no group, or one rank -> "local";  otherwise experts in contiguous blocks, and
        overlap is a number -> "alltoall" in about so many chunks;  "off" -> in one
        "auto" -> what costs least of `candidates` (`moe_fx.cost`), by the link and the speeds
                  measured here; decided by the group's first rank, once per kind of layer

Rejects (declined): weights gathered over another group than ``ep_group``; experts cut unevenly.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch.fx import GraphModule

from moe_fx.compat import resolve_group
from moe_fx.cost import Choice, Layer, choose
from moe_fx.decide import decide, link_of
from moe_fx.errors import ConfigurationError
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.cost_layer import device_of, layer_of
from moe_fx.plan import ExchangePlan, Predicted, slices
from moe_fx.rates import measured
from moe_fx.region import Declined, Region

CHUNKS = (1, 2, 4, 8, 16)


class Plan(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        kept: list[tuple[Region, ExchangePlan]] = []
        for region in context.regions:
            names = {gather.group_name for gather in region.parts.gathers}
            if context.group is not None:
                names.add(context.group.group_name)
            if len(names) > 1:
                reason = f"expert weights are gathered over more than one group: {sorted(names)}"
                context.report.declined.append(
                    Declined(reason, region.output, region.source, region.form)
                )
                continue
            group = resolve_group(names.pop()) if names else None
            kept.append((region, plan_exchange(region, group, context)))
        context.regions = [region for region, _ in kept]
        context.plans = [plan for _, plan in kept]
        return PassResult(module, changed=False)


def plan_exchange(
    region: Region, group: dist.ProcessGroup | None, context: Context
) -> ExchangePlan:
    experts = region.num_experts
    if group is None or group.size() == 1:
        return ExchangePlan("local", experts, experts)
    world = group.size()
    if experts % world:
        fitting = [n for n in range(1, experts + 1) if experts % n == 0]
        raise ConfigurationError(
            f"The MoE layer at {region.source} has {experts} experts, which do not divide by the "
            f"{world} ranks of the expert-parallel group. Each rank must own the same number of "
            f"experts: use a group of {', '.join(map(str, fitting))} ranks for this model."
        )
    local = experts // world
    place = (group.group_name, world, group.rank())
    if context.options.overlap == "auto" and context.measures:
        choice, predicted = _cheapest(region, group, context)
        return ExchangePlan(
            "alltoall",
            experts,
            local,
            *place,
            choice.expert_slices,
            choice.token_slices,
            predicted,
        )
    return ExchangePlan("alltoall", experts, local, *place, *asked(local, context.options.overlap))


def asked(local_experts: int, overlap: str | int) -> tuple[int, int]:
    """(expert slices, token slices) where nothing is measured."""
    return slices(local_experts, overlap if isinstance(overlap, int) else 1)


def candidates(local_experts: int) -> list[Choice]:
    """The first is what does nothing."""
    return list(dict.fromkeys(Choice(*slices(local_experts, chunks)) for chunks in CHUNKS))


def _cheapest(
    region: Region, group: dist.ProcessGroup, context: Context
) -> tuple[Choice, Predicted]:
    layer = layer_of(region, group.size(), context.training)
    device = device_of(region)
    timeout = context.options.agree_timeout
    link = link_of(group, device, timeout)

    def chosen() -> dict[str, Any]:
        options = [c for c in candidates(layer.local_experts) if c.legal(layer)]
        best, predictions = choose(layer, link, measured(device, layer.dtype), options)
        own = predictions[options.index(best)]
        predicted = Predicted(own.seconds, own.compute, own.exchange, predictions[0].seconds)
        return {"choice": asdict(best), "predicted": asdict(predicted)}

    found = decide(group, _kind(layer), chosen, timeout)
    return Choice(**found["choice"]), Predicted(**found["predicted"])


def _kind(layer: Layer) -> str:
    """All that ranks have in common."""
    return repr({k: v for k, v in asdict(layer).items() if k != "tokens"})
