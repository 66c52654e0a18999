"""What runs under ``torch.vmap`` travels through capture unopened: results, gradients, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import moe_fx
from tests.e2e.ranks import expert_block


class BeforeExperts(nn.Module):
    """``mapped(x)``, then experts."""

    def __init__(self, mapped: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mapped = mapped
        self.experts = expert_block()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x + self.mapped(x))


def one_level(x: Tensor) -> Tensor:
    return torch.vmap(lambda row: row.cumsum(0).sin())(x)


def two_levels(x: Tensor) -> Tensor:
    """An attention mask, as transformers makes those that are put together from functions."""
    positions = torch.arange(x.shape[1], device=x.device)
    allowed = torch.vmap(
        torch.vmap(lambda q, k: q.new_ones((), dtype=torch.bool) & (k <= q), (None, 0)), (0, None)
    )(positions, positions)
    return allowed.to(x.dtype) @ x


def several_results(x: Tensor) -> Tensor:
    low, high = torch.vmap(lambda row: (row.amin(0), row.amax(0)))(x)
    return torch.vmap(lambda row, a, b: (row - a) / (b - a + 1))(x, low, high)


def in_place(x: Tensor) -> Tensor:
    return torch.vmap(lambda row: row.add_(1))(x.clone())


def compiled(
    model: nn.Module, base: str = "eager", dynamic: bool = False
) -> tuple[nn.Module, list[moe_fx.Report]]:
    torch._dynamo.reset()
    reports: list[moe_fx.Report] = []
    options = {"base": base, "on_report": reports.append}
    return torch.compile(model, backend="moe_fx", dynamic=dynamic, options=options), reports


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mapped", [one_level, two_levels, several_results])
def test_experts_behind_it_are_found_and_results_equal(
    mapped: Callable[[Tensor], Tensor], dynamic: bool
) -> None:
    model = BeforeExperts(mapped)
    found, reports = compiled(model, dynamic=dynamic)
    for tokens in (5, 7) if dynamic else (5,):
        x = torch.randn(2, tokens, 64)
        torch.testing.assert_close(found(x), model(x))
    (report,) = reports
    assert len(report.regions) == 1
    assert report.declined == []


@pytest.mark.parametrize("base", ["eager", "aot_eager"])
@pytest.mark.parametrize("mapped", [one_level, two_levels])
def test_gradients_flow_through_it(mapped: Callable[[Tensor], Tensor], base: str) -> None:
    model = BeforeExperts(mapped)
    x = torch.randn(2, 5, 64, requires_grad=True)
    inputs = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), inputs)
    found, reports = compiled(model, base)
    gradients = torch.autograd.grad(found(x).square().sum(), inputs)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-3)
    assert len(reports[0].regions) == 1


def test_a_change_in_place_is_declined_and_runs_as_it_was() -> None:
    model = BeforeExperts(in_place)
    x = torch.randn(2, 5, 64)
    found, reports = compiled(model)
    torch.testing.assert_close(found(x), model(x))
    (report,) = reports
    assert report.regions == []
    assert "in place" in report.declined[0].reason
