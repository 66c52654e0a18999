"""Which strategies fit a region: what may be planned, before anything is weighed up."""

from __future__ import annotations

import logging

from moe_fx.compat import upper_bound
from moe_fx.graph.nodes import shape
from moe_fx.options import Options
from moe_fx.passes.base import Context
from moe_fx.passes.strategies.combine import sums_plainly
from moe_fx.plan import EVEN
from moe_fx.region import Region

WHOLE = ("gather_weights", "mc2", "direct")
"""Strategies that have no chunks."""

log = logging.getLogger("moe_fx")


class Misfit(Exception):
    """A region cannot be run as asked; the message says why."""


def fitting_strategies(region: Region, context: Context, world_size: int) -> list[str]:
    """Those that may be taken, the one for when nothing is measured first.

    Unless asked for, weights stay where they are: gathered, those of all layers would be in memory
    until the backward, and what is best for a prompt would be worst for the tokens after it. MC2 is
    for as few tokens as its buffers hold, and taken for those.
    """
    options = context.options
    if region.num_experts % world_size and context.device.lowers:
        raise Misfit(
            f"{region.num_experts} experts do not divide by {world_size} ranks, which has not been "
            "tried on this device"
        )
    if options.strategy != "auto":
        reason = misfit(region, options.strategy, context, world_size)
        if reason:
            raise Misfit(f"strategy={options.strategy!r} does not fit: {reason}")
        return [options.strategy]
    wanted = ["alltoall"]
    if options.even_tokens:
        if context.device.takes_mc2:
            reason = misfit(region, "mc2", context, world_size)
            if not reason:
                return ["mc2"]
            log.info("no MC2 for the layer at %s: %s", region.source, reason)
        wanted.append("allgather")
    return [each for each in wanted if not misfit(region, each, context, world_size)]


def most_chunks(strategy: str, options: Options) -> int:
    """GE graphs have no rows whose number only the host knows, as those of a chunk would be."""
    if strategy in WHOLE:
        return 1
    return 1 if strategy == "alltoall" and options.base == "torchair" else 1 << 30


def misfit(region: Region, strategy: str, context: Context, world_size: int) -> str:
    """Why ``strategy`` may not be taken; "" if it may."""
    parts = region.parts
    if strategy == "gather_weights" and not parts.gathers:
        return "the experts' weights are not gathered from shards, each rank has them whole"
    if strategy == "gather_weights" and region.program == "exchanged":
        return "the program exchanges tokens, so that a rank's experts may be its own in all things"
    if strategy in (*EVEN, "direct") and parts.weighs_tokens and region.top_k > 1:
        return "the routing weights multiply the tokens on their way to the experts"
    plainly = sums_plainly(parts) or (parts.weighs_tokens and strategy in ("allgather", "direct"))
    if strategy in ("allgather", "mc2", "direct") and not plainly:
        return "the experts' rows are not just weighted and summed"
    if strategy == "padded_alltoall" and context.options.base == "torchair":
        return "base='torchair' has no converters for it; 'allgather' has the same advantages"
    if strategy == "mc2":
        return _mc2_misfit(region, context, world_size)
    return ""


def _mc2_misfit(region: Region, context: Context, world_size: int) -> str:
    parts = region.parts
    if context.training:
        return "MC2 has no gradients"
    if region.num_experts % world_size:
        return f"{region.num_experts} experts do not divide by {world_size} ranks"
    if len(shape(parts.tokens)) != 2:
        return "the tokens have more than one dimension of features"
    if not parts.distinct:
        return "a token may meet an expert twice"
    return context.device.mc2_misfit(
        tokens=upper_bound(shape(parts.tokens)[0]),
        hidden=int(shape(parts.tokens)[1]),
        top_k=region.top_k,
        world_size=world_size,
    )
