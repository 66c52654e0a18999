"""Every MoE family of transformers: recognised, verified, with the right numbers."""

from __future__ import annotations

import pytest
import torch

import moe_fx
from moe_fx.region import Region, Router
from tests.families import BLOCKS, DECORATED, build, inputs

CASES = [
    *(pytest.param(label, "grouped_mm", torch.float32) for label in DECORATED),
    *(
        pytest.param(label, "batched_mm", torch.float32, marks=pytest.mark.slow)
        for label in DECORATED
    ),
    *(
        pytest.param(label, impl, torch.bfloat16, marks=pytest.mark.slow)
        for label in DECORATED
        for impl in ("grouped_mm", "batched_mm")
    ),
]


# What a router is called, where it is not the usual softmax or sigmoid.
ROUTERS = {
    "phimoe": Router("sparsemixer", verified=True),
    "zaya": Router("softmax", select_bias=True, zero_experts=1, verified=True),
    "inkling": Router(
        "sigmoid",
        select_bias=True,
        renormalise=True,
        scale=8.0,
        learned_scale=True,
        shared_columns=2,
        verified=True,
    ),
    "deepseek_v4": Router(
        "softplus_sqrt", select_bias=True, renormalise=True, scale=1.5, verified=True
    ),
    "deepseek_v4 (hash)": Router(
        "softplus_sqrt", selection="lookup", renormalise=True, scale=1.5, verified=True
    ),
    "kolibri1": Router("sigmoid", select_bias=True, select_on_logits=True, verified=True),
    "muse_spark": Router(
        "sigmoid", select_bias=True, renormalise=True, logit_scale=0.1768, verified=True
    ),
    "gemma4": Router("softmax", renormalise=True, expert_scale=True, verified=True),
    "diffusion_gemma": Router("softmax", renormalise=True, expert_scale=True, verified=True),
    "ernie4_5_moe": Router("softmax", select_bias=True, renormalise=True, verified=True),
}


def region_of(label: str, impl: str, dtype: torch.dtype, dynamic: bool = False) -> Region:
    module, _ = build(label, impl, dtype)
    with torch.no_grad():
        report = moe_fx.explain(module, *inputs(label, dtype), dynamic=dynamic)
    assert report.declined == []
    (region,) = report.regions
    assert report.graphs == 1
    assert region.verified
    expected = BLOCKS[label]
    assert (region.num_experts, region.top_k) == (expected.num_experts, expected.top_k)
    assert region.form == impl
    assert f"/modeling_{expected.family}.py:" in region.source
    return region


@pytest.mark.parametrize(("label", "impl", "dtype"), CASES, ids=str)
def test_every_family_is_recognised(label: str, impl: str, dtype: torch.dtype) -> None:
    router = region_of(label, impl, dtype).router
    if dtype == torch.float32:
        assert router.verified, router.note
        assert router == ROUTERS.get(label, router)


@pytest.mark.parametrize("label", ["phimoe", "zaya", "inkling", "deepseek_v4 (hash)", "axk1"])
def test_the_odd_ones_are_recognised_with_dynamic_sizes(label: str) -> None:
    assert region_of(label, "grouped_mm", torch.float32, dynamic=True).router.verified
