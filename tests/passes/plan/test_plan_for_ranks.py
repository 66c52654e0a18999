"""PlanForRanks: plans for ranks that do not exist, or the reason why there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest

import moe_fx
from moe_fx.options import Options
from moe_fx.passes import Context
from moe_fx.passes.plan.plan_for_ranks import PlanForRanks
from moe_fx.region import Gather, Region
from moe_fx.report import Report
from tests.testing.layers import Layer, tokens


@pytest.fixture(scope="module")
def region() -> Region:
    (found,) = moe_fx.explain(Layer(), tokens(12, 32)).regions
    return found


def gathered(region: Region, world_size: int) -> Region:
    table = region.parts.tables[0]
    gathers = (Gather(table, table, "experts", world_size),)
    return replace(region, program="gathered", parts=replace(region.parts, gathers=gathers))


def planned(region: Region, world_size: int, rank: int = 0) -> Context:
    context = Context(options=Options(), report=Report(), regions=[region])
    module = region.parts.combined.graph.owning_module
    assert module is not None
    PlanForRanks(world_size, rank)(module, context)
    return context


def test_experts_are_dealt_in_blocks(region: Region) -> None:
    context = planned(region, 4, rank=3)
    (plan,) = context.plans
    assert (plan.strategy, plan.world_size, plan.local_experts) == ("alltoall", 4, 2)
    assert plan.first_expert == 6
    assert [found.program for found in context.regions] == ["replicated"]
    assert list(context.report.pass_seconds) == ["plan"]


@pytest.mark.parametrize(("rank", "first"), [(0, 0), (2, 6)])
def test_the_last_ranks_have_fewer_where_experts_do_not_divide(
    region: Region, rank: int, first: int
) -> None:
    (plan,) = planned(region, 3, rank).plans
    assert (plan.num_experts, plan.local_experts, plan.places) == (8, 3, 9)
    assert plan.first_expert == first
    assert "3 ranks of 3 experts at most" in plan.summary


def test_one_rank_exchanges_nothing(region: Region) -> None:
    context = planned(region, 1)
    assert [plan.exchanges for plan in context.plans] == [False]
    assert [found.program for found in context.regions] == ["local"]


def test_gathered_weights_stay_gathered(region: Region) -> None:
    context = planned(gathered(region, 2), 2)
    assert [found.program for found in context.regions] == ["gathered"]


@pytest.mark.parametrize(
    ("shards", "ranks", "reason"),
    [
        (4, 2, "expert weights are gathered from 4 ranks, not 2"),
    ],
)
def test_rejects(region: Region, shards: int, ranks: int, reason: str) -> None:
    context = planned(gathered(region, shards) if shards else region, ranks)
    assert context.regions == context.plans == []
    (declined,) = context.report.declined
    assert declined.reason == reason
    assert (declined.node, declined.source) == (region.output, region.source)


def test_a_rank_must_be_one_of_them() -> None:
    with pytest.raises(ValueError, match="0 <= rank < world_size, got 2 and 2"):
        PlanForRanks(2, 2)
