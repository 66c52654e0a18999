"""Every spelling of an MoE block: recognised with its fields, and right on two ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe_fx
from moe_fx.ops.exchange import bytes_sent
from moe_fx.testing import RankPool
from tests.spellings import SPELLINGS
from tests.spellings.base import Spelling

Shapes = Literal["static", "dynamic"]
CUSTOM = ("hf_doge", "hf_vitpose")  # a product of two keys selects; nothing does
FORMS = {
    "gathered weights": ("batched_mm", "dense"),
    "sorted rows": ("grouped_mm",),
    "split rows": ("loop",),
    "loop": ("loop",),
    "dense": ("dense", "loop"),
    "capacity": ("dense",),
}
_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Outcome:
    """error: relative to the largest value of eager's result, the largest of all calls and
    gradients. graphs: compiled on this rank. sent: bytes of rows to the other rank."""

    regions: tuple[moe_fx.Region, ...]
    reasons: tuple[str, ...]
    error: float
    graphs: int
    sent: int


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def outcome(rank: int, name: str, shapes: Shapes, gradients: bool) -> Outcome:
    """On a rank: the block compiled, each rank with other tokens."""
    spelling = SPELLINGS[name]
    torch._dynamo.reset()
    module = spelling.build()
    reports: list[moe_fx.Report] = []
    compiled = torch.compile(
        module,
        backend="moe_fx",
        fullgraph=spelling.needs_fullgraph,
        dynamic=shapes == "dynamic",
        options={"ep_group": dist.group.WORLD, "base": "eager", "on_report": reports.append},
    )
    group = dist.group.WORLD
    assert group is not None
    error, sent = 0.0, bytes_sent(group.group_name)
    inputs = [spelling.tokens(seed=1 + rank)]
    if shapes == "dynamic":
        longer = torch.cat([spelling.tokens(seed=11 + rank), inputs[0]], dim=-2)
        inputs.append(longer[..., : 31 - rank, :])
    for x in inputs:
        if not gradients:
            with torch.no_grad():
                error = max(error, _difference(module(x), compiled(x)))
        else:
            error = max(error, *_gradient_differences(module, compiled, x))
    regions = [region for report in reports for region in report.regions]
    reasons = [entry.reason for report in reports for entry in report.declined]
    bare = tuple(_without_nodes(region) for region in regions)
    sent = bytes_sent(group.group_name) - sent
    return Outcome(bare, tuple(reasons), error, len(reports), sent)


def _without_nodes(region: moe_fx.Region) -> moe_fx.Region:
    """Nodes can't be sent between processes."""
    return replace(region, parts=None, listing=None)  # type: ignore[arg-type]


def _difference(expected: Tensor, found: Tensor) -> float:
    return float((expected - found).abs().max() / expected.abs().max())


def _gradient_differences(module: torch.nn.Module, compiled: object, x: Tensor) -> list[float]:
    """Of the result, the tokens' gradient and, summed over ranks, every parameter's."""
    results = []
    for fn in (module, compiled):
        leaf = x.clone().requires_grad_()
        module.zero_grad()
        out = fn(leaf)  # type: ignore[operator]
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        gradients = [leaf.grad]
        for parameter in module.parameters():
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            total = gradient.clone()
            dist.all_reduce(total)
            gradients.append(total)
        results.append([out.detach(), *gradients])
    return [_difference(a, b) for a, b in zip(*results, strict=True) if float(a.abs().max()) > 0]


def check(spelling: Spelling, by_rank: list[Outcome], tolerance_factor: float = 1.0) -> None:
    for found in by_rank:
        assert len(found.regions) == 1, found.reasons
        assert found.error <= tolerance_factor * _TOLERANCE[spelling.dtype]
        (region,) = found.regions
        assert region.verified and found.sent > 0
        assert (region.num_experts, region.top_k) == (spelling.num_experts, spelling.top_k)
        assert region.has_shared_expert == spelling.shared_expert


def _slow_but(*quick: str) -> list[object]:
    """Names of spellings; all but ``quick`` run with the slow tests."""
    assert set(quick) <= set(SPELLINGS)
    return [pytest.param(n, marks=() if n in quick else pytest.mark.slow) for n in SPELLINGS]


ONE_OF_EACH = _slow_but(
    *("gpt_fast", "gathered_one_hot", "torchtitan_grouped_before", "sorted_index_add_shared"),
    *("megatron_routing_map", "torchtitan_for_loop", "classic_mixtral", "classic_mixtral_stacked"),
    *("dense_einsum", "gpt_oss_dense", "masked_loop_where", "gshard_drops", "padded_slots_drops"),
    *("switch_loop", "hf_llama4", "hf_jetmoe", "hf_doge", "hf_vitpose"),
)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_right_on_two_ranks(name: str, ranks: RankPool) -> None:
    check(SPELLINGS[name], ranks.run(outcome, name, "static", False, timeout=120.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SPELLINGS if name != "hash_routed"])
def test_right_with_any_number_of_tokens(name: str, ranks: RankPool) -> None:
    check(SPELLINGS[name], ranks.run(outcome, name, "dynamic", False, timeout=120.0))


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n, s in SPELLINGS.items() if s.dtype == torch.float32])
def test_gradients_on_two_ranks(name: str, ranks: RankPool) -> None:
    check(SPELLINGS[name], ranks.run(outcome, name, "static", True, timeout=120.0), 10.0)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_router_and_form(name: str) -> None:
    spelling = SPELLINGS[name]
    settings = {
        "capture_scalar_outputs": spelling.needs_fullgraph,
        "capture_dynamic_output_shape_ops": spelling.needs_fullgraph,
    }
    with torch.no_grad(), torch._dynamo.config.patch(settings):
        report = moe_fx.explain(spelling.build(), spelling.tokens(), ranks=2)
    (region,) = report.regions
    # softmax over the selected logits is the renormalised softmax over all
    found, expected = (
        replace(r, softmax_after_topk=False) for r in (region.router, spelling.router)
    )
    if spelling.drops or name in CUSTOM:
        assert (found.score, found.verified) == ("custom", False) and found.note
    else:
        assert found == expected, str(report)
    assert region.form in FORMS[spelling.dispatch]
