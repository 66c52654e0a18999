"""What is planned where tensors are a GPU's: "direct" if ranks reach each other, no more chunks
than pay. Two real ranks on CPUs, which take themselves for GPUs and exchange over Gloo."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import moe_fx
from moe_fx.devices.cuda.device import Cuda
from moe_fx.testing import RankPool
from tests.e2e.test_direct_exchange import EXACT
from tests.passes.graphs import block, relative_error, tokens


def planned(rank: int, far: str, given: dict[str, Any]) -> tuple[list[str], list[str], float]:
    """(strategies and chunks, notes, error). far: why ranks do not reach each other."""
    torch._dynamo.reset()
    module, x = block("qwen3_moe"), tokens(1, 16, 64, seed=rank)
    reports: list[moe_fx.Report] = []
    exact = "exact" if given.pop("exact", False) else ""
    options = {
        "ep_group": dist.new_group(),
        "lower": "cuda",
        "base": "eager",
        "progress": False,
        "on_report": reports.append,
    }
    with (
        mock.patch.object(Cuda, "is_gpu", lambda *_: True),
        mock.patch.object(Cuda, "unreachable", lambda *_: far),
        mock.patch.dict(os.environ, {"MOE_FX_CHUNKS": exact}),
        torch.no_grad(),
    ):
        out = torch.compile(module, backend="moe_fx", options=options | given)(x)
        error = relative_error(module(x), out)
    (report,) = reports
    plans = [f"{plan.strategy} {plan.chunks}" for plan in report.plans]
    return plans or [each.reason for each in report.declined], report.notes, error


@pytest.mark.parametrize(
    ("far", "given", "expected"),
    [
        ("", {}, "direct 1"),
        ("", {"overlap": "off"}, "direct 1"),
        ("", {"strategy": "alltoall", "overlap": "off"}, "alltoall 1"),
        ("NCCL_P2P_DISABLE is set", {}, "alltoall 1"),
    ],
)
def test_direct_is_taken_where_gpus_reach_each_other(
    ranks2: RankPool, far: str, given: dict[str, Any], expected: str
) -> None:
    for plans, notes, error in ranks2.run(planned, far, given):
        assert plans == [expected]
        assert error <= EXACT
        assert [far in each and "is not planned as 'direct'" in each for each in notes] == (
            [True] if far else []
        )


def test_what_was_asked_for_and_cannot_be_is_said(ranks2: RankPool) -> None:
    for plans, _, _ in ranks2.run(planned, "ranks share a GPU", {"strategy": "direct"}):
        assert plans == ["strategy='direct' is for ranks that share a host: ranks share a GPU"]


@pytest.mark.parametrize("exact", [False, True])
def test_more_chunks_than_there_are_tokens(ranks2: RankPool, exact: bool) -> None:
    """None of those that are weighed has so many."""
    given = {"strategy": "allgather", "overlap": 32, "exact": exact}
    for (plan,), _, error in ranks2.run(planned, "", given):
        assert plan == ("allgather 32" if exact else "allgather 1")
        assert error <= EXACT


@pytest.mark.parametrize("strategy", ["auto", "alltoall"])
def test_chunks_that_do_not_pay_are_not_made_and_the_report_says_so(
    ranks2: RankPool, strategy: str
) -> None:
    """16 tokens do not."""
    given = {"strategy": strategy, "overlap": 4}
    for plans, notes, error in ranks2.run(planned, "", given):
        assert plans == ["alltoall 1"]
        (note,) = [each for each in notes if each.startswith("overlap=4: the layer at ")]
        assert "is planned in 1 chunk(s)" in note
        assert error <= EXACT
