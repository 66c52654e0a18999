"""`Report.expert_parameters`: the tables of experts, by what the model computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import moe_fx


class Odd(nn.Module):
    """Neither its name nor its parameters' say what they are."""

    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def made(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * 0.3)

        self.pick = made(rows, 16)
        self.up = made(rows, 16, 32)
        self.down = made(rows, 32, 16)
        self.unused = made(rows, 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = (x @ self.pick.t()).softmax(-1).topk(2)
        hidden = torch.einsum("th,tkhf->tkf", x, self.up[ids]).relu()
        rows = torch.einsum("tkf,tkfh->tkh", hidden, self.down[ids])
        return (rows * weights.unsqueeze(-1)).sum(1)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Odd(), Odd()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def test_explain_names_what_the_experts_are_made_of() -> None:
    report = moe_fx.explain(Two(), torch.randn(6, 16))
    assert len(report.regions) == 2, str(report)
    assert set(report.expert_parameters) == {
        f"layers.{at}.{name}" for at in (0, 1) for name in ("up", "down")
    }


@pytest.mark.parametrize("rows", [4, 6])
def test_a_dense_model_has_none(rows: int) -> None:
    assert moe_fx.explain(nn.Linear(rows, rows), torch.randn(3, rows)).expert_parameters == []
