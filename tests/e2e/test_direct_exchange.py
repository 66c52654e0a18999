"""Strategy "direct" on real ranks: whole models and blocks, ragged and no tokens, gradients, the
experts as one op and as captured, and a rank that does not come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import moe_fx
from moe_fx.testing import RankPool
from tests.e2e.ranks import Comparison, compare
from tests.passes.graphs import block, relative_error, tokens

EXACT = 1e-5


def compared(
    rank: int, family: str, program: str, base: str, gradients: bool, lower: str
) -> Comparison:
    return compare(
        rank,
        family,
        "grouped_mm",
        torch.float32,
        program,
        base=base,
        gradients=gradients,
        strategy="direct",
        lower=lower,
    )


def check(result: Comparison, ops: set[str]) -> None:
    assert {plan["strategy"] for plan in result.report["plans"]} == {"direct"}
    assert {plan["host_sync"] for plan in result.report["plans"]} == {""}
    assert ops <= set(result.ops)
    assert result.error <= EXACT
    assert {k: v for k, v in result.gradient_errors.items() if v > EXACT} == {}


@pytest.mark.parametrize("lower", ["off", "cuda"])
@pytest.mark.parametrize(
    ("family", "program"),
    [
        ("qwen3_moe", "gathered"),
        ("gpt_oss", "replicated"),
        pytest.param("deepseek_v3", "gathered", marks=pytest.mark.slow),
    ],
)
def test_models_equal_eager_with_every_gradient(
    ranks2: RankPool, family: str, program: str, lower: str
) -> None:
    """Ranks have other numbers of tokens."""
    ops = {"moe_fx.direct_dispatch.default", "moe_fx.direct_combine.default"}
    if lower == "cuda":
        ops |= {"moe_fx.fused_experts_training.default"}
    for result in ranks2.run(compared, family, program, "recording", True, lower):
        check(result, ops)


@pytest.mark.parametrize("lower", ["off", "cuda"])
def test_inductor_compiles_it(ranks2: RankPool, lower: str) -> None:
    for result in ranks2.run(compared, "qwen3_moe", "replicated", "inductor", False, lower):
        check(result, set())


def outputs(rank: int, counts: list[list[int]], lower: str) -> tuple[list[float], int, set[str]]:
    """(errors, compiled graphs, MoE ops) of a block on ``counts[rank]`` tokens, step by step."""
    torch._dynamo.reset()
    module = block("qwen3_moe")
    reports: list[moe_fx.Report] = []
    options: dict[str, Any] = {
        "ep_group": dist.new_group(),
        "base": "eager",
        "on_report": reports.append,
        "strategy": "direct",
        "lower": lower,
    }
    compiled = torch.compile(module, backend="moe_fx", dynamic=True, options=options)
    errors = []
    with torch.no_grad():
        for step, count in enumerate(counts[rank]):
            values = tokens(1, count, 64, seed=10 * step + rank)
            errors.append(relative_error(module(values), compiled(values)))
    return errors, len(reports), {to for each in reports[0].lowered for to in each.to}


@pytest.mark.parametrize("lower", ["off", "cuda"])
def test_one_graph_serves_every_number_of_tokens(ranks4: RankPool, lower: str) -> None:
    counts = [[12, 7, 33, 2], [5, 40, 2, 2], [2, 2, 2, 64], [9, 9, 9, 3]]
    for errors, graphs, ops in ranks4.run(outputs, counts, lower):
        assert max(errors) <= EXACT
        assert graphs == 1
        assert ("moe_fx::direct_experts" in ops) == (lower == "cuda")


def no_tokens(rank: int) -> float:
    """Rank 0 has none."""
    torch._dynamo.reset()
    module = block("qwen3_moe")
    options = {"ep_group": dist.new_group(), "base": "aot_eager", "strategy": "direct"}
    compiled = torch.compile(module, backend="moe_fx", options=options)
    values = tokens(1, 6, 64)[:, : 6 * rank]
    with torch.no_grad():
        found, wanted = compiled(values), module(values)
    assert found.shape == wanted.shape
    return relative_error(wanted, found) if rank else 0.0


def test_a_rank_without_tokens(ranks2: RankPool) -> None:
    assert max(ranks2.run(no_tokens)) <= EXACT
