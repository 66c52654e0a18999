"""Plan: how each region's tokens reach their experts.

Contract. In: recognised regions. Out: one `ExchangePlan` per region, the same on every rank but for
the rank number.

Pseudo-code::

    group = the gather's group if the weights are gathered, else the option's
    no group, or one rank -> "local";  otherwise experts in contiguous blocks of one size, but that
        the last ranks may have fewer or none, and
        of the strategies asked for, those that fit the region;  "auto", on GPUs that write to each
        other's memory -> "direct" if it does
        overlap is a number -> the first of them in about so many chunks, on GPUs in so many at
        most, as for "auto";  "off" -> in one
        "auto" -> what costs least of them in `CHUNKS` chunks (`moe_fx/cost`), by the link and the
                  speeds measured here; decided by the group's first rank, once per kind of layer
        chunks of an exact all-to-all are cut by rows; by expert on NPUs, and in training by a base
        compiler whose backward graph is out of reach

Rejects (declined): weights gathered over another group than ``ep_group``; a region that the
strategy asked for does not fit.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import GraphModule

from moe_fx.blocks import most_experts
from moe_fx.compat import resolve_group
from moe_fx.cost.decide import decide, link_of
from moe_fx.cost.layer import PRICED, Choice, Layer, choose, timeline
from moe_fx.cost.rates import measured
from moe_fx.options import ORDERS_LATER, Options
from moe_fx.passes.base import Context, Pass, PassResult
from moe_fx.passes.strategies.cost_layer import buffer_bytes, device_of, layer_of
from moe_fx.passes.strategies.fitting import (
    WHOLE,
    Misfit,
    fitting_strategies,
    misfit,
    most_chunks,
)
from moe_fx.plan import ExchangePlan, Predicted, Span, Weighed, slices
from moe_fx.region import Declined, Region

log = logging.getLogger("moe_fx")

CHUNKS = (1, 2, 4, 8)
"""What `"auto"` weighs up. With 16, half as much of the exchange's ends stays exposed: 3 % of it.
Measured (docs/overlap.md), they took from 3 % less to 16 % more time than 8."""


class Plan(Pass):
    def _apply(self, module: GraphModule, context: Context) -> PassResult:
        kept: list[tuple[Region, ExchangePlan]] = []
        for region in context.regions:
            try:
                kept.append((region, plan_exchange(region, _group_of(region, context), context)))
            except Misfit as misfit:
                context.report.declined.append(
                    Declined(str(misfit), region.output, region.source, region.form)
                )
        context.regions = [region for region, _ in kept]
        context.plans = [plan for _, plan in kept]
        return PassResult(module, changed=False)


def _group_of(region: Region, context: Context) -> dist.ProcessGroup | None:
    names = {gather.group_name for gather in region.parts.gathers}
    if context.group is not None:
        names.add(context.group.group_name)
    if len(names) > 1:
        raise Misfit(f"expert weights are gathered over more than one group: {sorted(names)}")
    return resolve_group(names.pop()) if names else None


def plan_exchange(
    region: Region, group: dist.ProcessGroup | None, context: Context
) -> ExchangePlan:
    experts = region.num_experts
    if group is None or group.size() == 1:
        return ExchangePlan("local", experts, experts)
    world = group.size()
    strategies = _for_peers(region, group, context, fitting_strategies(region, context, world))
    predicted, chunks = None, _asked_chunks(context.options)
    priced = context.measures and PRICED.issuperset(strategies)
    if priced and context.options.overlap == "auto":
        choice, predicted = _cheapest(region, group, context, strategies)
    elif _may_be_fewer(strategies[0], chunks, context, device_of(region)) and priced:
        choice, predicted = _cheapest(region, group, context, strategies[:1], chunks)
        _say_fewer(region, context, chunks, choice, predicted)
    else:
        choice = asked(strategies[0], most_experts(experts, world), context)
    return planned(
        region, choice, context.options, (group.group_name, world, group.rank()), predicted
    )


def _for_peers(
    region: Region, group: dist.ProcessGroup, context: Context, strategies: list[str]
) -> list[str]:
    """Of ``strategies`` what these ranks can run. Where any may be taken, "direct" alone if GPUs
    write to each other's memory: it sends the fewest bytes and waits for nothing, and was the
    fastest at every point that was measured (docs/performance.md). A number of chunks is asked of
    the others, as it has none."""
    device, options = device_of(region), context.options
    if not context.measures or not context.device.is_gpu(device):
        return strategies
    asked = strategies == ["direct"]
    if not asked and (options.strategy != "auto" or _asked_chunks(options) > 1):
        return strategies
    reason = misfit(region, "direct", context, group.size())
    reason = reason or context.device.unreachable(group, device, options.agree_timeout)
    if not reason:
        return ["direct"]
    if asked:
        raise Misfit(f"strategy='direct' is for ranks that share a host: {reason}")
    _note(context, f"strategy: the layer at {region.source} is not planned as 'direct': {reason}")
    return strategies


def _asked_chunks(options: Options) -> int:
    return options.overlap if isinstance(options.overlap, int) else 1


def _may_be_fewer(strategy: str, chunks: int, context: Context, device: torch.device) -> bool:
    exact = os.environ.get("MOE_FX_CHUNKS") == "exact"
    return chunks > 1 and strategy not in WHOLE and context.device.is_gpu(device) and not exact


def _say_fewer(
    region: Region, context: Context, chunks: int, choice: Choice, predicted: Predicted
) -> None:
    most = max(predicted.weighed, key=lambda each: each.chunks)
    if choice.chunks >= most.chunks:
        return
    note = (
        f"overlap={chunks}: the layer at {region.source} is planned in {choice.chunks} chunk(s), "
        f"expected to take {1e3 * predicted.seconds:.3g} ms; in {most.chunks} it would take "
        f"{1e3 * most.seconds:.3g} ms, as the host launches chunks one after the other"
    )
    _note(context, note)


def _note(context: Context, text: str) -> None:
    log.info("%s", text)
    context.report.notes.append(text)


def planned(
    region: Region,
    choice: Choice,
    options: Options,
    place: tuple[str, int, int],
    predicted: Predicted | None = None,
) -> ExchangePlan:
    """place: the group's name, its ranks, and this rank."""
    experts = region.num_experts
    return ExchangePlan(
        choice.strategy,
        experts,
        experts if choice.strategy == "gather_weights" else most_experts(experts, place[1]),
        *place,
        choice.expert_slices,
        choice.token_slices,
        choice.row_slices,
        capacity_factor=choice.capacity_factor,
        drop=options.on_overflow == "drop",
        predicted=predicted,
        buffer_bytes=buffer_bytes(region, place[1]) if choice.strategy == "direct" else 0,
    )


def asked(strategy: str, local_experts: int, context: Context) -> Choice:
    """Where nothing is measured."""
    options = context.options
    chunks = _asked_chunks(options)
    most = most_chunks(strategy, options)
    if chunks > most:
        log.warning(
            "overlap=%d: strategy=%r is planned in %d chunks at most%s",
            chunks,
            strategy,
            most,
            "" if strategy in WHOLE else f" for base={options.base!r}",
        )
    return _cut(strategy, local_experts, min(chunks, most), context)


def candidates(
    strategies: Sequence[str], local_experts: int, context: Context, most: int = 0
) -> list[Choice]:
    """The first is what does nothing. most: chunks; 0: as many as are worth a try."""
    weighed = [*[n for n in CHUNKS if n < most], most] if most else CHUNKS
    return list(
        dict.fromkeys(
            _cut(strategy, local_experts, chunks, context)
            for strategy in strategies
            for chunks in weighed
            if chunks <= most_chunks(strategy, context.options)
        )
    )


def _cut(strategy: str, local_experts: int, chunks: int, context: Context) -> Choice:
    if strategy == "alltoall":
        by_rows = _by_rows(context)
        return Choice(row_slices=chunks) if by_rows else Choice(*slices(local_experts, chunks))
    if strategy in WHOLE:
        return Choice(1, 1, strategy)
    return Choice(1, chunks, strategy, context.options.capacity_factor)


def _by_rows(context: Context) -> bool:
    """Whether chunks of an exact all-to-all are cut by rows. In training each chunk has gradients
    of all experts' weights: only where they are summed as one. Not on NPUs, whose graphs know
    chunks by expert."""
    if context.training:
        return _sums_gradients(context)
    return not context.device.lowers


def _sums_gradients(context: Context) -> bool:
    return context.options.base in ORDERS_LATER and not context.device.lowers


def _cheapest(
    region: Region,
    group: dist.ProcessGroup,
    context: Context,
    strategies: Sequence[str],
    most: int = 0,
) -> tuple[Choice, Predicted]:
    sums_gradients = _sums_gradients(context)
    layer = layer_of(region, group.size(), context.training, sums_gradients)
    device = device_of(region)
    timeout = context.options.agree_timeout
    link = link_of(group, device, timeout)

    def chosen() -> dict[str, Any]:
        options = [
            choice
            for choice in candidates(strategies, layer.local_experts, context, most)
            if choice.legal(layer)
        ]
        compute = measured(device, layer.dtype)
        best, predictions = choose(layer, link, compute, options)
        own = predictions[options.index(best)]
        predicted = Predicted(
            own.seconds,
            own.compute,
            own.exchange,
            predictions[0].seconds,
            timeline(layer, link, compute, best),
            timeline(layer, link, compute, options[0]),
            tuple(
                Weighed(choice.strategy, choice.chunks, prediction.seconds)
                for choice, prediction in zip(options, predictions, strict=True)
            ),
        )
        return {"choice": asdict(best), "predicted": asdict(predicted)}

    found = decide(group, f"{list(strategies)} {most} {_kind(layer)}", chosen, timeout)
    return Choice(**found["choice"]), _predicted(**found["predicted"])


def _predicted(
    timeline: Any, timeline_unoverlapped: Any, weighed: Any, **seconds: float
) -> Predicted:
    """From JSON."""
    spans = [tuple(Span(**each) for each in found) for found in (timeline, timeline_unoverlapped)]
    return Predicted(
        **seconds,
        timeline=spans[0],
        timeline_unoverlapped=spans[1],
        weighed=tuple(Weighed(**each) for each in weighed),
    )


def _kind(layer: Layer) -> str:
    """All that ranks have in common."""
    return repr({k: v for k, v in asdict(layer).items() if k != "tokens"})
