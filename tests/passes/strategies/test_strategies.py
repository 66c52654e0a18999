"""Strategies of equal parts and "direct": the layer's values on simulated ranks, and what does not
fit them."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from moe_fx.errors import ConfigurationError
from moe_fx.options import parse_options
from tests.passes.graphs import (
    block,
    captured,
    error_on_ranks,
    op_names,
    rewritten,
    rewritten_on_ranks,
    tokens,
)
from tests.spellings import SPELLINGS

PADDED = ["allgather", "padded_alltoall"]
NO_COUNTS = [*PADDED, "direct"]


@pytest.mark.parametrize("strategy", NO_COUNTS)
@pytest.mark.parametrize("chunks", ["off", 3])
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_blocks_compute_the_same_without_a_host_sync(
    family: str, world: int, chunks: int | str, strategy: str
) -> None:
    case = captured(block(family), tokens(1, 13, 64))
    graphs, report = rewritten_on_ranks(case.module, world, strategy=strategy, overlap=chunks)
    assert graphs is not None, report.declined
    (plan,) = report.plans
    assert (plan.strategy, plan.host_sync) == (strategy, "")
    token = 64 * 4 + 8 * report.regions[0].top_k
    assert plan.buffer_bytes == (2 * world * 13 * token if strategy == "direct" else 0)
    assert plan.token_slices == (1 if chunks == "off" or strategy == "direct" else chunks)
    assert "moe_fx.split_sizes.default" not in op_names(graphs[0])
    assert error_on_ranks(case, graphs) <= 1e-5


@pytest.mark.parametrize("strategy", NO_COUNTS)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_gradients_are_verified(family: str, strategy: str) -> None:
    case = captured(block(family).requires_grad_(True), tokens(1, 13, 64))
    graph, report = rewritten(case.module, 2, training=True, strategy=strategy, overlap=2)
    assert graph is not None, report.declined
    (region,) = report.regions
    assert region.verification is not None
    assert "tokens" in region.verification.gradients


@pytest.mark.parametrize("strategy", NO_COUNTS)
def test_bfloat16(strategy: str) -> None:
    case = captured(
        block("qwen3_moe", dtype=torch.bfloat16), tokens(1, 13, 64, dtype=torch.bfloat16)
    )
    graphs, report = rewritten_on_ranks(case.module, 2, strategy=strategy, overlap=2)
    assert graphs is not None, report.declined
    assert error_on_ranks(case, graphs) <= 2e-2


@pytest.mark.parametrize("strategy", NO_COUNTS)
@pytest.mark.parametrize("name", ["gpt_fast", "masked_loop", "switch_masked", "gshard_drops"])
def test_spellings_read_by_value(name: str, strategy: str) -> None:
    spelling = SPELLINGS[name]
    case = captured(spelling.build(), spelling.tokens())
    graphs, report = rewritten_on_ranks(case.module, 2, strategy=strategy, overlap=2)
    assert graphs is not None, report.declined
    assert error_on_ranks(case, graphs) <= 1e-5


@pytest.mark.parametrize("strategy", PADDED)
def test_enough_capacity_changes_nothing_and_too_little_is_an_error_or_drops(strategy: str) -> None:
    case = captured(block("qwen3_moe"), tokens(1, 24, 64))

    def found(**given: object) -> float:
        graphs, report = rewritten_on_ranks(
            case.module,
            2,
            "off",
            strategy=strategy,
            **given,  # type: ignore[arg-type]
        )
        assert graphs is not None, report.declined
        return error_on_ranks(case, graphs)

    assert found(capacity_factor=2.0) <= 1e-5
    with pytest.raises(RuntimeError, match="capacity_factor"):
        found(capacity_factor=0.5)
    assert 1e-3 < found(capacity_factor=0.5, on_overflow="drop") < 10


def test_a_rewrite_that_drops_is_not_declined_by_verification() -> None:
    case = captured(block("qwen3_moe"), tokens(1, 24, 64))
    graph, report = rewritten(
        case.module, 2, strategy="padded_alltoall", capacity_factor=0.5, on_overflow="drop"
    )
    assert graph is not None, report.declined


class TopOneOnTokens(nn.Module):
    """Llama4's way with one expert a token, as it is used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = nn.Linear(32, 8, bias=False)
        self.up, self.down = (nn.Parameter(torch.randn(8, 32, 32) / 6) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.router(x)
        best, ids = logits.topk(1, dim=-1)
        scores = torch.full_like(logits, float("-inf")).scatter(1, ids, best).sigmoid()
        rows = x.unsqueeze(1) * scores.unsqueeze(-1)
        hidden = torch.einsum("teh,ehf->tef", rows, self.up).relu()
        return torch.einsum("tef,efh->teh", hidden, self.down).sum(1)


@pytest.mark.parametrize("strategy", ["alltoall", *NO_COUNTS])
def test_weights_on_the_tokens_of_one_expert_each(strategy: str) -> None:
    case = captured(TopOneOnTokens(), tokens(22, 32))
    graphs, report = rewritten_on_ranks(case.module, 2, strategy=strategy, overlap=2)
    assert graphs is not None, report.declined
    assert error_on_ranks(case, graphs) <= 1e-5


@pytest.mark.parametrize("strategy", NO_COUNTS)
def test_weights_on_the_tokens_of_several_experts_do_not_fit(strategy: str) -> None:
    spelling = SPELLINGS["llama4_before"]
    case = captured(spelling.build(), spelling.tokens())
    graph, report = rewritten(case.module, 2, strategy=strategy)
    assert graph is None
    assert "multiply the tokens" in report.declined[0].reason


PLANTED = {
    "the first experts on every rank": (
        "moe_fx.plan.ExchangePlan.first_expert",
        property(lambda _: 0),
    ),
    "no weights": ("moe_fx.passes.strategies.even.weights_of_sum", lambda _: None),
    "too few slots": ("moe_fx.passes.strategies.even._capacity", lambda _: (2, 0.2, True)),
    "shares of one rank only": (
        "moe_fx.passes.strategies.even._summed",
        lambda emitter, shares: emitter.call(torch.ops.aten.select.int, shares, 0, 0),
    ),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_verification_sees_a_bug_in_the_way_of_the_rows(bug: str) -> None:
    case = captured(block("qwen3_moe"), tokens(1, 13, 64))
    with mock.patch(*PLANTED[bug]):
        graph, report = rewritten(case.module, 2, strategy="allgather")
    assert graph is None
    assert "changed the result" in report.declined[0].reason


def test_weights_that_nobody_gathers_cannot_travel() -> None:
    graph, report = rewritten(
        captured(block("qwen3_moe"), tokens(1, 13, 64)).module, 2, strategy="gather_weights"
    )
    assert graph is None
    assert "each rank has them whole" in report.declined[0].reason


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"strategy": "alltoall", "capacity_factor": 1.0}, "padded_alltoall"),
        ({"capacity_factor": 1.0}, "not 'auto'"),
        ({"strategy": "allgather", "capacity_factor": 0.0}, "greater than 0"),
        ({"strategy": "allgather", "on_overflow": "drop"}, "without a capacity_factor"),
        ({"strategy": "broadcast"}, "'gather_weights'"),
    ],
)
def test_options_that_mean_nothing_are_errors(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        parse_options(given)


def test_chunks_that_torchair_has_not_are_said(caplog: pytest.LogCaptureFixture) -> None:
    case = captured(block("qwen3_moe"), tokens(1, 13, 64))
    with caplog.at_level("WARNING", logger="moe_fx"):
        _, report = rewritten(case.module, 2, strategy="alltoall", overlap=4, base="torchair")
    assert report.plans[0].chunks == 1
    assert "overlap=4: strategy='alltoall' is planned in 1 chunks at most" in caplog.text
