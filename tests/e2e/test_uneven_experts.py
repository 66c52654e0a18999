"""Numbers of experts that the ranks do not divide: every strategy, results and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

import moe_fx
from moe_fx.testing import RankPool
from tests.passes.graphs import block, relative_error, tokens

EXACT = 1e-5
WAYS: dict[str, dict[str, Any]] = {
    "all-to-all": {"strategy": "alltoall", "overlap": "off"},
    "cut by rows": {"strategy": "alltoall", "overlap": 3, "base": "inductor"},
    "cut by expert": {"strategy": "alltoall", "overlap": 2, "base": "eager"},
    "allgather": {"strategy": "allgather", "overlap": 2},
    "padded": {"strategy": "padded_alltoall"},
    "direct": {"strategy": "direct"},
    "direct, fused": {"strategy": "direct", "lower": "cuda"},
}


def trained(
    rank: int, family: str, experts: int, way: dict[str, Any], training: bool
) -> tuple[float, dict[str, float], list[tuple[str, int]]]:
    """Errors of the result and, summed over the ranks, of every gradient; and what was planned."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    sizes = {"num_local_experts" if family == "gpt_oss" else "num_experts": experts}
    module = block(family, **sizes).requires_grad_(training)
    reports: list[moe_fx.Report] = []
    options = {
        "base": "aot_eager",
        "ep_group": dist.new_group(),
        "strict": True,
        "on_report": reports.append,
        **way,
    }
    compiled = torch.compile(module, backend="moe_fx", options=options)
    found = []
    for call in (module, compiled):
        module.zero_grad()
        x = tokens(1, 12, 64, seed=rank).requires_grad_(training)
        with torch.set_grad_enabled(training):
            out = call(x)
            out = out if isinstance(out, torch.Tensor) else out[0]
        grads = {}
        if training:
            out.square().sum().backward()
            assert x.grad is not None
            grads = {name: param.grad.clone() for name, param in module.named_parameters()}
            for grad in grads.values():
                dist.all_reduce(grad)
            grads["tokens"] = x.grad
        found.append((out.detach(), grads))
    (right, wanted), (made, given) = found
    errors = {name: relative_error(wanted[name], given[name]) for name in wanted}
    plans = [(plan.strategy, plan.num_experts) for each in reports for plan in each.plans]
    return relative_error(right, made), errors, plans


def check(results: list[Any], way: dict[str, Any], experts: int) -> None:
    for error, gradients, plans in results:
        assert error <= EXACT
        assert {name: off for name, off in gradients.items() if off > EXACT} == {}
        assert {(way["strategy"], experts)} == set(plans)


@pytest.mark.parametrize("experts", [5, 7])
@pytest.mark.parametrize("way", WAYS)
def test_two_ranks(ranks2: RankPool, way: str, experts: int) -> None:
    if way == "cut by rows":
        pytest.skip("Inductor takes long: below")
    check(ranks2.run(trained, "qwen3_moe", experts, WAYS[way], True), WAYS[way], experts)


@pytest.mark.parametrize("experts", [5, 6, 7])
@pytest.mark.parametrize("way", ["all-to-all", "allgather", "padded", "direct"])
def test_four_ranks(ranks4: RankPool, way: str, experts: int) -> None:
    """Of 5 experts the last rank has none."""
    check(ranks4.run(trained, "qwen3_moe", experts, WAYS[way], True), WAYS[way], experts)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_chunks_cut_by_rows(ranks2: RankPool, training: bool) -> None:
    way = WAYS["cut by rows"]
    check(ranks2.run(trained, "qwen3_moe", 7, way, training, timeout=280), way, 7)


def test_biases_too(ranks2: RankPool) -> None:
    way = WAYS["all-to-all"]
    check(ranks2.run(trained, "gpt_oss", 5, way, True), way, 5)
