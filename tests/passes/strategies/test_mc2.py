"""MC2 as a strategy: values on simulated ranks, what it can't be taken for, limits of devices."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch.fx import GraphModule

from moe_fx.compat import upper_bound
from moe_fx.devices.ascend.mc2 import LIMITS, limits
from tests.passes.graphs import (
    block,
    captured,
    error_on_ranks,
    op_names,
    rewritten,
    rewritten_on_ranks,
    tokens,
)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_blocks_compute_the_same_in_two_ops(family: str, world: int) -> None:
    case = captured(block(family), tokens(1, 13, 64))
    graphs, report = rewritten_on_ranks(case.module, world, strategy="mc2")
    assert graphs is not None, report.declined
    assert report.plans[0].host_sync == ""
    names = op_names(graphs[0])
    assert names.count("moe_fx.distribute.default") == 1
    assert names.count("moe_fx.collect.default") == 1
    assert error_on_ranks(case, graphs) <= 1e-5


def test_it_has_no_gradients() -> None:
    case = captured(block("qwen3_moe").requires_grad_(True), tokens(1, 13, 64))
    graph, report = rewritten(case.module, 2, training=True, strategy="mc2")
    assert graph is None
    assert "MC2 has no gradients" in report.declined[0].reason


FITTING = {
    "A2": {"tokens": 256, "hidden": 7168, "top_k": 8, "world_size": 16},
    "A3": {"tokens": 512, "hidden": 2048, "top_k": 8, "world_size": 8},
}
BEYOND = [
    ("A2", {"tokens": 257}, "257 tokens a rank, MC2 takes at most 256 on A2"),
    ("A3", {"tokens": 513}, "at most 512"),
    ("A2", {"tokens": None}, "nothing bounds them here"),
    ("A2", {"hidden": 100}, "32 to 7168 in steps of 32"),
    ("A3", {"hidden": 512}, "1024 to 7168"),
    ("A2", {"top_k": 9}, "9 experts a token"),
    ("A2", {"world_size": 8}, "8 ranks, MC2 takes 16, 32, 64 on A2"),
]


@pytest.mark.parametrize("generation", LIMITS)
def test_what_fits_a_device(generation: str) -> None:
    with mock.patch("moe_fx.devices.ascend.npu.generation", lambda: generation):
        assert limits(**FITTING[generation]) == ""


@pytest.mark.parametrize("generation, change, message", BEYOND)
def test_what_does_not(generation: str, change: dict[str, int], message: str) -> None:
    with mock.patch("moe_fx.devices.ascend.npu.generation", lambda: generation):
        assert message in limits(**(FITTING[generation] | change))


def test_an_unknown_device_is_none_it_is_known_for() -> None:
    with mock.patch("moe_fx.devices.ascend.npu.generation", lambda: "Ascend310P"):
        assert "this is Ascend310P" in limits(**FITTING["A2"])


def test_bfloat16() -> None:
    case = captured(
        block("qwen3_moe", dtype=torch.bfloat16), tokens(1, 13, 64, dtype=torch.bfloat16)
    )
    graphs, report = rewritten_on_ranks(case.module, 2, strategy="mc2")
    assert graphs is not None, report.declined
    assert error_on_ranks(case, graphs) <= 2e-2


def test_a_bounded_number_of_tokens_has_a_bound() -> None:
    seen: list[int | None] = []

    def noting(module: GraphModule, inputs: list[Any]) -> Any:
        [x] = module.graph.find_nodes(op="placeholder")[-1:]
        seen.append(upper_bound(x.meta["example_value"].shape[0]))
        return module.forward

    for most in (256, None):
        x = torch.ones(9, 4)
        torch._dynamo.reset()
        torch._dynamo.mark_dynamic(x, 0, **({"min": 2, "max": most} if most else {}))
        torch.compile(torch.relu, backend=noting)(x)
    assert seen == [256, None]
