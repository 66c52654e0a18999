"""Twelve transformers families, both experts implementations, fp32 and bf16, on two real ranks."""

from __future__ import annotations

import pytest
import torch

import moe_fx
from moe_fx.testing import RankPool
from tests.e2e.ranks import compare
from tests.models import FAMILIES, build, token_ids

IMPLEMENTATIONS = ("grouped_mm", "batched_mm")
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


# What differs in bf16 is the grouped matmul: its cases run with the slow tests.
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)],
    ids=lambda dtype: str(dtype)[6:],
)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_explain_finds_every_layer_with_its_fields(
    family: str, impl: str, dtype: torch.dtype
) -> None:
    expected = FAMILIES[family]
    model, config = build(family, impl, dtype)
    report = moe_fx.explain(model, input_ids=token_ids(config, 1, 12), use_cache=False)
    assert report.declined == []
    assert len(report.regions) == expected.moe_layers
    for region in report.regions:
        router = region.router
        assert (region.num_experts, region.top_k) == (expected.num_experts, expected.top_k)
        assert (router.score, router.select_bias) == (expected.score, expected.select_bias)
        assert (router.num_groups, router.topk_group) == (expected.num_groups, expected.topk_group)
        assert router.renormalise == expected.renormalise
        assert router.scale == pytest.approx(expected.scale, rel=1e-2)
        assert region.has_shared_expert == expected.shared_expert
        assert (region.form, region.program) == (impl, "local")
        assert region.verified
        assert f"/{expected.name}/modeling_{expected.name}.py:" in region.source


MAIN = ("qwen3_moe", "deepseek_v3", "gpt_oss")


def _marks(family: str, impl: str, dtype: torch.dtype) -> list[pytest.MarkDecorator]:
    """By day, with the slow tests, or by hand."""
    differs = (impl != "grouped_mm") + (dtype != torch.float32)
    if family in MAIN:
        return [pytest.mark.slow] if differs else []
    return [pytest.mark.slow if differs < 2 else pytest.mark.grid]


CASES = [
    pytest.param(family, impl, dtype, program, marks=_marks(family, impl, dtype))
    for family in FAMILIES
    for impl in IMPLEMENTATIONS
    for dtype in DTYPES
    for program in ("replicated", "gathered")
]


@pytest.mark.parametrize(("family", "impl", "dtype", "program"), CASES, ids=str)
def test_two_ranks_give_what_eager_gives(
    ranks2: RankPool, family: str, impl: str, dtype: torch.dtype, program: str
) -> None:
    for result in ranks2.run(compare, family, impl, dtype, program):
        assert result.error <= TOLERANCE[dtype]
        assert result.graphs == 1
        assert len(result.report["regions"]) == FAMILIES[family].moe_layers
        assert {region["program"] for region in result.report["regions"]} == {program}
        assert sum("moe_fx.wait" in op for op in result.ops) == 2 * FAMILIES[family].moe_layers
        assert not any("all_gather" in op for op in result.ops)
