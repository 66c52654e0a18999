"""Ranks that compile different plans are told so, each of them; none hangs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moe_fx.compat import resolve_group
from moe_fx.errors import RanksDiffer
from moe_fx.plan import ExchangePlan
from moe_fx.ranks import agree
from moe_fx.ranks.agree import agree_once, describe
from moe_fx.ranks.presence import Stand, others
from moe_fx.testing import RankPool

LONG, SHORT = 60.0, 0.3
"""Seconds: for ranks that do come, and for one that never does."""


def new_group() -> str:
    """A group that has agreed on nothing yet. The ranks keep it, and what was published."""
    group = dist.new_group()
    assert group is not None
    return group.group_name


def plans_for(group: str, num_experts: int = 8, layers: int = 1) -> list[ExchangePlan]:
    world, rank = dist.get_world_size(), dist.get_rank()
    plan = ExchangePlan("alltoall", num_experts, num_experts // world, group, world, rank)
    return [plan] * layers


def total(value: int) -> int:
    """The compiled graph: it would hang if a rank did not come."""
    mine = torch.tensor(value)
    dist.all_reduce(mine)
    return int(mine)


def outcome(
    plans: Sequence[ExchangePlan], group: str, training: bool = False, timeout: float = LONG
) -> str:
    """What the compiled graph returns, or the error's kind and message."""
    run = agree_once(total, [group], plans, training, timeout)
    try:
        return str(run(1))
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"


def raised(run: Callable[..., object]) -> str:
    try:
        run()
    except RanksDiffer as error:
        return str(error)
    return ""


# -- agreeing --------------------------------------------------------------------------------------


def run_same_plans(rank: int) -> tuple[str, str]:
    group = new_group()
    first = outcome(plans_for(group), group)
    return first, outcome(plans_for(group, layers=2), group, training=True)


def test_equal_plans_run(ranks4: RankPool) -> None:
    assert ranks4.run(run_same_plans) == [("4", "4")] * 4


def run_without_plans(rank: int) -> str:
    return outcome([], new_group())


def test_no_plans_at_all_are_plans_too(ranks2: RankPool) -> None:
    assert ranks2.run(run_without_plans) == ["2", "2"]


def test_the_rank_is_no_part_of_what_must_be_alike() -> None:
    plan = ExchangePlan("alltoall", 8, 4, "group", 2, 0)
    assert describe([plan], False) == describe([dataclasses.replace(plan, rank=1)], False)
    assert describe([plan], False) != describe([dataclasses.replace(plan, num_experts=16)], False)


# -- differing -------------------------------------------------------------------------------------


def run_other_experts_on(rank: int, odd_one: int) -> str:
    group = new_group()
    return outcome(plans_for(group, num_experts=16 if rank == odd_one else 8), group)


def test_other_plans_on_one_rank_are_an_error_on_every_rank_that_names_rank_and_difference(
    ranks4: RankPool,
) -> None:
    for rank, message in enumerate(ranks4.run(run_other_experts_on, 2)):
        assert message.startswith("RanksDiffer"), f"rank {rank}: {message}"
        eight, sixteen = (f"local_experts={n // 4}, num_experts={n}" for n in (8, 16))
        mine, theirs = (sixteen, eight) if rank == 2 else (eight, sixteen)
        other = 0 if rank == 2 else 2
        assert f"rank {rank} has in layer 0 {mine} where rank {other} has" in message
        assert f"where rank {other} has in layer 0 {theirs} (" in message
        differing = [0, 1, 3] if rank == 2 else [2]
        assert f"ranks that differ from rank {rank}: {differing}" in message


def run_more_layers_on(rank: int, odd_one: int) -> str:
    group = new_group()
    return outcome(plans_for(group, layers=3 if rank == odd_one else 2), group)


def test_another_number_of_layers_is_named(ranks2: RankPool) -> None:
    first, second = ranks2.run(run_more_layers_on, 1)
    assert "rank 0 has 2 MoE layers where rank 1 has 3 MoE layers" in first
    assert "rank 1 has 3 MoE layers where rank 0 has 2 MoE layers" in second


def run_training_on(rank: int, odd_one: int) -> str:
    group = new_group()
    return outcome(plans_for(group), group, training=rank == odd_one)


def test_training_here_and_inference_there_is_named(ranks2: RankPool) -> None:
    first, second = ranks2.run(run_training_on, 1)
    assert "rank 0 has an inference graph where rank 1 has a training graph" in first
    assert "rank 1 has a training graph where rank 0 has an inference graph" in second


def run_no_match_on(rank: int, odd_one: int) -> str:
    group = new_group()
    return outcome([] if rank == odd_one else plans_for(group), group)


def test_a_rank_where_nothing_matched_differs(ranks2: RankPool) -> None:
    first, second = ranks2.run(run_no_match_on, 1)
    assert "rank 0 has 1 MoE layers where rank 1 has 0 MoE layers" in first
    assert "rank 1 has 0 MoE layers where rank 0 has 1 MoE layers" in second


def run_in_another_order_on(rank: int, odd_one: int) -> list[str]:
    group = new_group()
    layers = (2, 1) if rank == odd_one else (1, 2)
    runs = [agree_once(total, [group], plans_for(group, layers=n), False, LONG) for n in layers]
    return [raised(run) for run in runs]


def test_graphs_compiled_in_another_order_differ(ranks2: RankPool) -> None:
    for messages in ranks2.run(run_in_another_order_on, 1):
        assert all(message.startswith("Ranks compiled different") for message in messages)


# -- missing ---------------------------------------------------------------------------------------


def tcp_store() -> dist.Store:
    """What ``init_process_group`` makes by default; the ranks of a pool share a file instead."""
    host, world = "127.0.0.1", dist.get_world_size()
    port = [0]
    if dist.get_rank() == 0:
        server = dist.TCPStore(host, 0, world, is_master=True, wait_for_workers=False)
        port = [server.port]
    dist.broadcast_object_list(port)
    return server if dist.get_rank() == 0 else dist.TCPStore(host, port[0], world)


def run_except_on(rank: int, absent: int, tcp: bool) -> str:
    group = new_group()
    store = tcp_store() if tcp else resolve_group(group).get_group_store()
    with mock.patch.object(agree, "group_store", lambda _: store):
        ended = "absent" if rank == absent else outcome(plans_for(group), group, timeout=SHORT)
    dist.barrier()  # rank 0 serves the store
    return ended


@pytest.mark.parametrize("tcp", [True, False], ids=["TCPStore", "FileStore"])
def test_a_rank_that_never_compiles_is_an_error_after_the_timeout_that_names_it(
    ranks4: RankPool, tcp: bool
) -> None:
    outcomes = ranks4.run(run_except_on, 2, tcp)
    assert outcomes.pop(2) == "absent"
    for message in outcomes:
        assert message.startswith("RanksDiffer")
        assert "waited 0.3 s for rank(s) [2] of the expert-parallel group" in message


def given_up_on(rank: int) -> dict[int, Stand]:
    """Who is said to wait in the group once one rank has waited in vain."""
    name = new_group()
    group = resolve_group(name)
    said = mock.Mock(wraps=agree.say)
    with mock.patch.object(agree, "say", said):
        assert rank == 1 or "RanksDiffer" in outcome(plans_for(name), name, timeout=SHORT)
    assert rank == 1 or said.call_args_list[0].args[1] is not None, "it did not say that it waits"
    dist.barrier()
    return others(group)


def test_a_rank_that_gave_up_is_not_said_to_wait(ranks2: RankPool) -> None:
    """Who goes on with the group, and waits for a slow rank, is not told of an old wait."""
    assert ranks2.run(given_up_on) == [{}, {}]


# -- again -----------------------------------------------------------------------------------------


def compile_again_on(rank: int, recompiling: int) -> list[str]:
    """All agree; then one compiles the same plans again, for other shapes, and asks nobody; then
    all compile something new."""
    group = new_group()
    outcomes = [outcome(plans_for(group), group)]
    if rank == recompiling:
        with mock.patch.object(agree, "group_store", side_effect=LookupError):
            outcomes.append(agree_once(lambda: "ran", [group], plans_for(group), False, SHORT)())
    return [*outcomes, outcome(plans_for(group, layers=2), group)]


def test_the_same_plans_compiled_again_need_no_new_agreement(ranks2: RankPool) -> None:
    assert ranks2.run(compile_again_on, 1) == [["2", "2"], ["2", "ran", "2"]]


def call_twice_on_differing(rank: int) -> list[str]:
    group = new_group()
    run = agree_once(lambda: "ran", [group], plans_for(group, layers=rank + 1), False, LONG)
    return [raised(run), raised(run)]


def test_running_again_after_a_disagreement_is_an_error_again(ranks2: RankPool) -> None:
    for first, second in ranks2.run(call_twice_on_differing):
        assert first and first == second


def compile_twice_on_differing(rank: int) -> list[str]:
    group = new_group()
    plans = plans_for(group, layers=rank + 1)
    runs = [agree_once(lambda: "ran", [group], plans, False, LONG) for _ in range(2)]
    return [raised(run) for run in runs]


def test_compiling_again_after_a_disagreement_is_an_error_again(ranks2: RankPool) -> None:
    for first, second in ranks2.run(compile_twice_on_differing):
        assert first and first == second
