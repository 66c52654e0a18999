"""Reading by value: a spelling that no rule knows, and is changed, is read as changed or declined.

Each sibling breaks one thing of a dense layer. None may become the layer it looks like.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_fx
from moe_fx.graph.feature_dims import regrouped
from tests.passes.graphs import captured, error_on_ranks, rewritten_on_ranks, tokens
from tests.spellings import SPELLINGS

EXPERTS, HIDDEN, WIDTH = 8, 32, 24


class Dense(nn.Module):
    """Every expert on every token, weighed by a gate matrix."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def random(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(sizes, generator=generator) * sizes[-1] ** -0.5)

        self.gate, self.norm = random(EXPERTS, HIDDEN), random(HIDDEN)
        self.up, self.down = random(EXPERTS, HIDDEN, WIDTH), random(EXPERTS, WIDTH, HIDDEN)
        self.bias = random(EXPERTS, HIDDEN)

    def gates(self, x: Tensor) -> Tensor:
        weights, ids = F.linear(x, self.gate).softmax(-1).topk(2)
        return torch.zeros(x.shape[0], EXPERTS).scatter(1, ids, weights)

    def rows(self, x: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("td,edf->tef", x, self.up))
        return torch.einsum("tef,efd->ted", hidden, self.down)

    def combine(self, rows: Tensor, gates: Tensor, x: Tensor) -> Tensor:
        return torch.einsum("ted,te->td", rows, gates)

    def forward(self, x: Tensor) -> Tensor:
        return self.combine(self.rows(x), self.gates(x), x)


class NextExpertsGate(Dense):
    def gates(self, x: Tensor) -> Tensor:
        return super().gates(x).roll(1, dims=1)


class WeighedTwice(Dense):
    def combine(self, rows: Tensor, gates: Tensor, x: Tensor) -> Tensor:
        return super().combine(rows, gates * gates, x)


class Biased(Dense):
    def rows(self, x: Tensor) -> Tensor:
        return super().rows(x) + self.bias


class NextExpertsTable(Dense):
    def rows(self, x: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("td,edf->tef", x, self.up.roll(1, dims=0)))
        return torch.einsum("tef,efd->ted", hidden, self.down)


class ResidualInside(Dense):
    def rows(self, x: Tensor) -> Tensor:
        return super().rows(x) + x.unsqueeze(1)


class AllExperts(Dense):
    """Not two of them: the rest have weights too."""

    def gates(self, x: Tensor) -> Tensor:
        return super().gates(x) + 0.1


class NeighboursRows(Dense):
    def rows(self, x: Tensor) -> Tensor:
        return super().rows(x).roll(1, dims=0)


class CentredTokens(Dense):
    """What each rank sends is made of its own tokens, as captured."""

    def rows(self, x: Tensor) -> Tensor:
        return super().rows(x - x.mean(0, keepdim=True))


class SquashedAfterwards(Dense):
    def combine(self, rows: Tensor, gates: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(rows * gates.unsqueeze(-1)).sum(1)


READ = (Dense, WeighedTwice, Biased, CentredTokens)
EITHER = (NextExpertsGate, NextExpertsTable, ResidualInside)
DECLINED = (AllExperts, NeighboursRows, SquashedAfterwards)


@pytest.mark.parametrize("verify", ["off", "compile"])
@pytest.mark.parametrize("kind", [*READ, *EITHER, *DECLINED], ids=lambda kind: kind.__name__)
def test_a_change_is_read_as_changed_or_declined(kind: type[Dense], verify: str) -> None:
    case = captured(kind(), tokens(22, HIDDEN))
    graphs, report = rewritten_on_ranks(case.module, 2, verify)
    if graphs is None:
        assert kind not in READ, report.declined
        assert report.declined and all(entry.reason for entry in report.declined)
        return
    assert kind not in DECLINED
    assert error_on_ranks(case, graphs) <= 1e-5


@pytest.mark.parametrize(
    ("before", "features", "after", "expected"),
    [
        ((6, 4), (False, True), (2, 3, 4), (False, False, True)),
        ((6, 4), (False, True), (6, 1, 2, 2), (False, False, True, True)),
        ((8, 22, 4), (False, False, True), (176, 4), (False, True)),
        ((6, 4), (False, True), (24,), None),
        ((6, 4), (False, True), (3, 8), None),
    ],
)
def test_a_reshape_keeps_rows_and_features_apart(
    before: tuple[int, ...],
    features: tuple[bool, ...],
    after: tuple[int, ...],
    expected: tuple[bool, ...] | None,
) -> None:
    assert regrouped(before, features, after) == expected


class Normed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.layer(F.layer_norm(x, x.shape[-1:]))


@pytest.mark.parametrize("name", ["masked_loop", "dense_einsum", "gpt_fast", "gshard"])
def test_every_layer_of_a_deep_model_is_read(name: str) -> None:
    spelling = SPELLINGS[name]
    layers = nn.Sequential(*(Normed(spelling.build()) for _ in range(4)))
    case = captured(layers, spelling.tokens())
    graphs, report = rewritten_on_ranks(case.module, 2)
    assert graphs is not None and report.declined == []
    assert [region.verified for region in report.regions] == [True] * 4
    assert error_on_ranks(case, graphs) <= 1e-5


class SomeExperts(nn.Module):
    """A masked loop over the first experts only."""

    def __init__(self, read: int) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(read))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).max(-1, keepdim=True)
        result = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            result = torch.where(ids == number, expert(x), result)
        return result * weights


class LookedUp(nn.Module):
    """Matrices and biases of each token's experts, looked up. top_k 1: by ``max``. activation: of
    what is between the matrices."""

    def __init__(self, top_k: int, activation: Callable[[Tensor], Tensor] = torch.relu) -> None:
        super().__init__()
        self.top_k, self.activation = top_k, activation
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, HIDDEN, HIDDEN) / 4)
        self.bias = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).softmax(-1)
        if self.top_k == 1:
            weights, ids = scores.max(-1)
            rows = torch.einsum("th,thi->ti", x, self.up[ids]) + self.bias[ids]
            rows = torch.einsum("ti,tih->th", self.activation(rows), self.down[ids])
            return rows * weights[:, None]
        weights, ids = scores.topk(self.top_k)
        rows = torch.einsum("th,tkhi->tki", x, self.up[ids]) + self.bias[ids]
        rows = torch.einsum("tki,tkih->tkh", self.activation(rows), self.down[ids])
        return (rows * weights[..., None]).sum(1)


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("count", [EXPERTS - 1, EXPERTS, EXPERTS // 2, HIDDEN])
def test_biases_of_experts_are_read_however_many_the_tokens(top_k: int, count: int) -> None:
    """As many tokens as experts: a bias per expert has the shape of a scale per token."""
    case = captured(LookedUp(top_k), tokens(count, HIDDEN))
    graphs, report = rewritten_on_ranks(case.module, 2)
    assert graphs is not None and report.declined == []
    assert error_on_ranks(case, graphs) <= 1e-5


def _root_where_positive(rows: Tensor) -> Tensor:
    return torch.where(rows > 0, rows.sqrt(), 0.0)


def test_a_layer_without_finite_gradients_is_unproved_with_that_reason() -> None:
    module = LookedUp(2, _root_where_positive)
    (declined,) = moe_fx.explain(module, tokens(5, HIDDEN), ranks=2).declined
    assert re.fullmatch(r"unproved: the layer's gradient of \w+ is not finite .*", declined.reason)


class OneSelectionAfterTheOther(nn.Module):
    """Each expert is run once for the first selections of tokens, and once for the second."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(-1).topk(2)
        result = torch.zeros_like(x)
        for place in range(2):
            for number, expert in enumerate(self.experts):
                share = weights[:, place] * (ids[:, place] == number)
                result = result + share[:, None] * expert(x)
        return result


def test_experts_run_once_for_each_selection_are_declined_with_what_to_do() -> None:
    case = captured(OneSelectionAfterTheOther(), tokens(22, HIDDEN))
    graphs, report = rewritten_on_ranks(case.module, 2)
    assert graphs is None
    assert [entry.reason for entry in report.declined] == [
        "each of a token's 2 selections is compared with the 8 experts by itself: run an expert "
        "once, on all tokens that selected it"
    ]


def test_a_loop_over_some_of_the_experts_is_declined_with_those_it_leaves_out() -> None:
    graphs, report = rewritten_on_ranks(captured(SomeExperts(6), tokens(22, HIDDEN)).module, 2)
    assert graphs is None
    assert [entry.reason for entry in report.declined] == [
        "the selected ids are compared with 6 of 8 experts, never with 6, 7"
    ]
    graphs, report = rewritten_on_ranks(captured(SomeExperts(8), tokens(22, HIDDEN)).module, 2)
    assert graphs is not None and not report.declined
