"""Strategies on two real ranks: whole models and blocks, what is sent, ranks that break the promise
of equal numbers of tokens, and which strategy is chosen."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import moe_fx
from moe_fx.cost.link import Link
from moe_fx.ops.exchange import bytes_sent, pending_exchanges
from moe_fx.passes.plan import planner
from moe_fx.plan import ExchangePlan
from moe_fx.testing import RankPool
from tests.e2e.ranks import Comparison, compare
from tests.passes.graphs import block, relative_error, tokens

EXACT = 1e-5
EVEN = ["allgather", "padded_alltoall"]
SAME_LENGTH = (9, 9)


def strategy_compared(
    rank: int, family: str, program: str, base: str, gradients: bool, strategy: str, chunks: int
) -> Comparison:
    return compare(
        rank,
        family,
        "grouped_mm",
        torch.float32,
        program,
        base=base,
        gradients=gradients,
        lengths=SAME_LENGTH,
        strategy=strategy,
        overlap=chunks,
    )


@pytest.mark.parametrize("strategy", EVEN)
@pytest.mark.parametrize(
    "family", ["qwen3_moe", pytest.param("deepseek_v3", marks=pytest.mark.slow)]
)
def test_models_equal_eager_with_every_gradient(
    ranks2: RankPool, family: str, strategy: str
) -> None:
    results = ranks2.run(strategy_compared, family, "gathered", "recording", True, strategy, 2)
    for result in results:
        assert {plan["strategy"] for plan in result.report["plans"]} == {strategy}
        assert result.error <= EXACT
        assert {k: v for k, v in result.gradient_errors.items() if v > EXACT} == {}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", EVEN)
def test_inductor_compiles_it(ranks2: RankPool, strategy: str) -> None:
    for result in ranks2.run(
        strategy_compared, "qwen3_moe", "replicated", "inductor", False, strategy, 2
    ):
        assert result.error <= EXACT


@pytest.mark.parametrize("gradients", [False, True])
def test_gathered_weights_travel_as_captured(ranks2: RankPool, gradients: bool) -> None:
    for result in ranks2.run(
        strategy_compared, "qwen3_moe", "gathered", "recording", gradients, "gather_weights", 1
    ):
        assert "moe_fx.all_to_all.default" not in result.ops
        assert "moe_fx.grouped_mm.default" in result.ops
        assert result.error <= EXACT
        assert {k: v for k, v in result.gradient_errors.items() if v > EXACT} == {}


def outputs(
    rank: int, counts: list[list[int]], strategy: str, chunks: int
) -> tuple[list[float], int, int]:
    """(errors, compiled graphs, bytes sent) of a block on ``counts[rank]`` tokens, step by step."""
    torch._dynamo.reset()
    module = block("qwen3_moe")
    group = dist.new_group()
    reports: list[moe_fx.Report] = []
    options: dict[str, Any] = {"ep_group": group, "base": "eager"}
    options["on_report"] = reports.append
    options |= {"strategy": strategy, "overlap": chunks}
    compiled = torch.compile(module, backend="moe_fx", dynamic=True, options=options)
    errors = []
    with torch.no_grad():
        for step, count in enumerate(counts[rank]):
            values = tokens(1, count, 64, seed=10 * step + rank)
            errors.append(relative_error(module(values), compiled(values)))
    assert pending_exchanges() == 0
    return errors, len(reports), bytes_sent(group.group_name)


@pytest.mark.parametrize("strategy", EVEN)
def test_one_graph_serves_every_number_of_tokens(ranks2: RankPool, strategy: str) -> None:
    steps = [12, 7, 33, 2]
    for errors, graphs, _ in ranks2.run(outputs, [steps, steps], strategy, 2):
        assert max(errors) <= EXACT
        assert graphs == 1


def test_an_allgather_sends_each_token_once(ranks2: RankPool) -> None:
    """8 experts, 2 a token: all tokens (256 B), ids (8 B) and weights (8 B), and the results."""
    for _, _, sent in ranks2.run(outputs, [[16], [16]], "allgather", 1):
        assert sent == 16 * (256 + 8 + 8 + 256)


def broken_promise(rank: int, strategy: str) -> str:
    try:
        outputs(rank, [[12], [15]], strategy, 1)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("strategy", EVEN)
def test_other_numbers_of_tokens_are_an_error_on_every_rank(
    ranks2: RankPool, strategy: str
) -> None:
    for message in ranks2.run(broken_promise, strategy):
        assert "the same number of tokens on every rank" in message


def chosen(rank: int, link: Link, even: bool) -> ExchangePlan:
    torch._dynamo.reset()
    reports: list[moe_fx.Report] = []
    group = dist.new_group()
    module = block("qwen3_moe", num_experts_per_tok=4)
    options = {
        "ep_group": group,
        "base": "eager",
        "on_report": reports.append,
        "even_tokens": even,
    }
    compiled = torch.compile(module, backend="moe_fx", options=options)
    with mock.patch.object(planner, "link_of", lambda *_: link), torch.no_grad():
        compiled(tokens(1, 64, 64))
    return reports[0].plans[0]


NARROW = Link(latency=1e-5, alone=1e-6, two=6e-7, busy=6e-7)


def test_tokens_that_have_four_experts_on_two_ranks_go_everywhere_once_if_they_may(
    ranks2: RankPool,
) -> None:
    assert {p.strategy for p in ranks2.run(chosen, NARROW, True)} == {"allgather"}
    assert {p.strategy for p in ranks2.run(chosen, NARROW, False)} == {"alltoall"}


def test_weights_stay_unless_asked_for(ranks2: RankPool) -> None:
    """However many the tokens, and small the weights."""
    assert {plan.strategy for plan in ranks2.run(small_experts, "auto")} == {"alltoall"}
    plans = ranks2.run(small_experts, "gather_weights")
    assert {plan.strategy for plan in plans} == {"gather_weights"}


def small_experts(rank: int, strategy: str) -> ExchangePlan:
    torch._dynamo.reset()
    reports: list[moe_fx.Report] = []
    group = dist.new_group()
    module = block("qwen3_moe", moe_intermediate_size=8)
    moe_fx.shard_experts(module, group)
    options = {"base": "eager", "on_report": reports.append, "strategy": strategy}
    compiled = torch.compile(module, backend="moe_fx", options=options)
    link = Link(latency=1e-5, alone=1e-6, two=1e-6, busy=1e-6)
    with mock.patch.object(planner, "link_of", lambda *_: link), torch.no_grad():
        compiled(tokens(1, 4096, 64, seed=rank))
    return reports[0].plans[0]
