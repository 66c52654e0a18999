"""Routers in one op: the captured weights and ids, and left as captured where that is not sure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from moe_fx.device import Device
from moe_fx.options import Options
from moe_fx.passes import ANALYSIS, Context, for_ranks
from moe_fx.passes.rewrite.fuse_router import FuseRouter
from moe_fx.passes.rewrite.rewrite import Rewrite
from moe_fx.report import Report
from tests.passes.graphs import BLOCKS, block, captured, relative_error, tokens

GATE = torch.ops.moe_fx.gating_top_k.default
TRAINED = torch.ops.moe_fx.gating_top_k_training.default


def fused(
    module: GraphModule,
    fuses: bool = True,
    training: bool = False,
    report: Report | None = None,
    trains: bool = False,
) -> GraphModule:
    device = Device(fuses_routers=fuses, trains_routers=trains)
    context = Context(Options(), report or Report(), training=training, device=device)
    for step in for_ranks(1, passes=(*ANALYSIS, FuseRouter(), Rewrite())):
        module = step(module, context).module
    assert context.regions, context.report.declined
    return module


def gates(module: GraphModule, gate: Any = GATE) -> list[Any]:
    return module.graph.find_nodes(op="call_function", target=gate)


@pytest.mark.parametrize("family", BLOCKS)
def test_a_router_of_each_kind_gives_the_same_values(family: str) -> None:
    case = captured(block(family), tokens(1, 13, 64))
    module = fused(case.module)
    assert len(gates(module)) == 1
    left = {str(node.target) for node in module.graph.nodes}
    assert "aten.topk.default" not in left
    torch.testing.assert_close(module(*case.inputs)[0], case.module(*case.inputs)[0])


def test_not_in_training_and_not_unless_asked() -> None:
    case = captured(block("qwen3_moe"), tokens(1, 13, 64))
    assert gates(fused(case.module, fuses=False)) == []
    assert gates(fused(case.module, training=True)) == []


@pytest.mark.parametrize("family", BLOCKS)
def test_in_training_gradients_are_those_of_the_captured_router(family: str) -> None:
    case = captured(block(family), tokens(1, 13, 64))
    module = fused(case.module, training=True, trains=True)
    assert len(gates(module, TRAINED)) == 1
    found = []
    for program in (module, case.module):
        leaves = [
            each.detach().clone().requires_grad_(each.is_floating_point()) for each in case.inputs
        ]
        differentiated = [each for each in leaves if each.requires_grad]
        result = program(*leaves)[0].square().sum()
        found.append(torch.autograd.grad(result, differentiated, allow_unused=True))
    for made, right in zip(*found, strict=True):
        assert made is not None or right is None
        assert right is None or relative_error(made, right) < 1e-5


class Grouped(nn.Module):
    """DeepSeek-V3's selection, its unselected groups masked with ``mask``."""

    def __init__(self, mask: float) -> None:
        super().__init__()
        self.mask = mask
        self.experts = block("deepseek_v3").experts
        self.gate = nn.Linear(64, 8, bias=False)
        self.bias = nn.Parameter(torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 64)
        scores = self.gate(x).sigmoid()
        choice = (scores + self.bias).view(-1, 4, 2)
        best = choice.topk(2, -1).values.sum(-1).topk(2, -1).indices
        kept = torch.zeros_like(choice[..., 0]).scatter(1, best, 1.0).unsqueeze(-1).bool()
        ids = choice.masked_fill(~kept, self.mask).flatten(1).topk(2, -1).indices
        weights = scores.gather(1, ids)
        return self.experts(x, ids, weights / weights.sum(-1, keepdim=True))


@pytest.mark.parametrize("mask, fits", [(float("-inf"), 1), (0.0, 0)])
def test_groups_masked_with_zero_are_not_groups_left_out(mask: float, fits: int) -> None:
    """With a bias below zero an expert of an unselected group would be selected."""
    case = captured(Grouped(mask).requires_grad_(False), tokens(1, 13, 64))
    assert len(gates(fused(case.module))) == fits


def test_why_a_router_is_left_alone_is_reported() -> None:
    case = captured(Grouped(0.0).requires_grad_(False), tokens(1, 13, 64))
    report = Report()
    fused(case.module, report=report)
    [kept] = report.lowered
    assert kept.op == "router" and "groups that are not selected" in kept.kept
    assert kept.source
