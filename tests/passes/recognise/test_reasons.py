"""What is said of layers that are left alone, and that one layer is one entry of the report."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import moe_fx
from moe_fx.report import Report

EXPERTS, HIDDEN, TOKENS, TOP_K = 4, 16, 6, 2
_GENERATOR = torch.Generator().manual_seed(0)


def _drawn(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=_GENERATOR)


GATE = _drawn(EXPERTS, HIDDEN)
W1, W2 = _drawn(EXPERTS, HIDDEN, HIDDEN) / 4, _drawn(EXPERTS, HIDDEN, HIDDEN) / 4
X = _drawn(TOKENS, HIDDEN)
Between = Callable[[Tensor], Tensor]


def same(rows: Tensor) -> Tensor:
    return rows


def route(x: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = torch.softmax(x @ GATE.t(), -1).topk(TOP_K)
    return weights, ids


def grouped(x: Tensor, weights: Tensor, ids: Tensor, between: Between = same) -> Tensor:
    flat = ids.reshape(-1)
    order = torch.argsort(flat, stable=True)
    offsets = torch.bincount(flat, minlength=EXPERTS).cumsum(0, dtype=torch.int32)
    multiply = torch.ops.moe_fx.grouped_mm
    rows = between(torch.relu(multiply(x[order // TOP_K], W1, offsets)))
    rows = multiply(rows, W2, offsets) * weights.reshape(-1)[order].unsqueeze(1)
    return rows[torch.argsort(order)].view(x.shape[0], TOP_K, -1).sum(1)


def gathered(x: Tensor, weights: Tensor, ids: Tensor, between: Between = same) -> Tensor:
    h = between(torch.relu(torch.einsum("th,tkhi->tki", x, W1[ids])))
    return (torch.einsum("tki,tkih->tkh", h, W2[ids]) * weights[..., None]).sum(1)


def dense(x: Tensor, weights: Tensor, ids: Tensor, between: Between = same) -> Tensor:
    combine = torch.zeros(x.shape[0], EXPERTS).scatter(1, ids, weights)
    h = between(torch.relu(torch.einsum("th,ehf->etf", x, W1)))
    return torch.einsum("etf,efh,te->th", h, W2, combine)


def loop(x: Tensor, weights: Tensor, ids: Tensor, between: Between = same) -> Tensor:
    out = torch.zeros_like(x)
    for expert in range(EXPERTS):
        share = (weights * (ids == expert)).sum(-1, keepdim=True)
        out = out + share * (between(torch.relu(x @ W1[expert])) @ W2[expert])
    return out


SPELLINGS = [grouped, gathered, dense, loop]
each_spelling = pytest.mark.parametrize("experts", SPELLINGS, ids=lambda each: each.__name__)


def explained(model: Callable[[Tensor], Tensor], *, training: bool = False) -> Report:
    torch._dynamo.reset()
    with (
        torch.set_grad_enabled(training),
        torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True),
    ):
        return moe_fx.explain(model, X)


@each_spelling
def test_two_layers_that_share_their_experts_are_both_found(experts: Callable[..., Tensor]) -> None:
    def model(x: Tensor) -> Tensor:
        for _ in range(2):
            x = x + experts(x, *route(x))
        return x

    report = explained(model)
    assert len(report.regions) == 2 and not report.declined


@each_spelling
def test_dropout_among_the_rows_is_named(experts: Callable[..., Tensor]) -> None:
    report = explained(
        lambda x: experts(x, *route(x), lambda rows: F.dropout(rows, 0.1, training=True)),
        training=True,
    )
    (declined,) = report.declined
    assert "a random op (aten.dropout.default with p=0.1) takes part" in declined.reason
    assert declined.reads_experts and not report.regions
    assert declined.source.startswith(__file__)


@each_spelling
@pytest.mark.parametrize(("chance", "training"), [(0.0, True), (0.1, False)])
def test_dropout_that_drops_nothing_is_no_obstacle(
    experts: Callable[..., Tensor], chance: float, training: bool
) -> None:
    report = explained(
        lambda x: experts(x, *route(x), lambda rows: F.dropout(rows, chance, training))
    )
    assert len(report.regions) == 1 and not report.declined


@each_spelling
def test_noise_among_the_rows_is_named(experts: Callable[..., Tensor]) -> None:
    report = explained(lambda x: experts(x, *route(x), lambda rows: rows + torch.randn_like(rows)))
    (declined,) = report.declined
    assert "a random op (aten.randn_like.default) takes part" in declined.reason


@each_spelling
def test_what_is_random_around_the_layer_is_no_obstacle(experts: Callable[..., Tensor]) -> None:
    """Jitter of the tokens, dropout of the weights and of the result, stochastic depth."""

    def model(x: Tensor) -> Tensor:
        jittered = x * torch.empty_like(x).uniform_(0.99, 1.01)
        weights, ids = route(jittered)
        result = experts(jittered, F.dropout(weights, 0.1, training=True), ids)
        kept = torch.bernoulli(torch.full((TOKENS, 1), 0.8))
        return x + kept * F.dropout(result, 0.1, training=True)

    report = explained(model)
    assert len(report.regions) == 1 and not report.declined


@each_spelling
def test_statistics_over_all_rows_are_named(experts: Callable[..., Tensor]) -> None:
    def normalised(rows: Tensor) -> Tensor:
        flat = rows.reshape(-1, HIDDEN)
        return F.batch_norm(flat, None, None, training=True).view(rows.shape)

    report = explained(lambda x: experts(x, *route(x), normalised))
    (declined,) = report.declined
    assert "batch_norm" in declined.reason and "not known to keep rows apart" in declined.reason


@pytest.mark.parametrize("experts", [grouped, gathered, loop], ids=lambda each: each.__name__)
@pytest.mark.parametrize("scores", [EXPERTS, 2 * EXPERTS])
def test_mapped_ids_are_one_layer(experts: Callable[..., Tensor], scores: int) -> None:
    """The router's ids are looked up in a table of the experts they stand for."""
    stands_for = torch.tensor([2, 0, 3, 1] * (scores // EXPERTS))
    gate = torch.cat([GATE, -GATE])[:scores]

    def model(x: Tensor) -> Tensor:
        weights, ids = torch.softmax(x @ gate.t(), -1).topk(TOP_K)
        return experts(x, weights, stands_for[ids])

    report = explained(model)
    assert len(report.regions) + len(report.declined) == 1


@each_spelling
def test_a_graph_break_behind_the_router_is_named(experts: Callable[..., Tensor]) -> None:
    def model(x: Tensor) -> Tensor:
        weights, ids = route(x)
        torch._dynamo.graph_break()
        return experts(x, weights, ids)

    report = explained(model)
    router = report.declined[0]
    line = model.__code__.co_firstlineno + 2
    assert "the selected indices never bring tokens to experts here" in router.reason
    assert f"behind the graph break at {__file__}:{line}" in router.reason
    assert not router.reads_experts


@pytest.mark.parametrize("experts", [grouped, gathered], ids=lambda each: each.__name__)
def test_experts_behind_a_graph_break_are_found_by_themselves(
    experts: Callable[..., Tensor],
) -> None:
    def model(x: Tensor) -> Tensor:
        weights, ids = route(x)
        torch._dynamo.graph_break()
        return experts(x, weights, ids)

    report = explained(model)
    assert len(report.regions) == 1 and not report.missed


def test_ids_from_outside_that_may_name_no_expert_are_declined() -> None:
    """A loop compares ids; behind a graph break nothing says that each is one of the loop's."""

    def model(x: Tensor) -> Tensor:
        weights, ids = route(x)
        torch._dynamo.graph_break()
        return loop(x, weights, ids)

    (missed,) = explained(model).missed
    assert "the expert ids come from outside of this graph" in missed.reason


class Hyper(nn.Module):
    """Experts that are scaled by an input, which another rank may have otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w2 = nn.Parameter(W1.clone()), nn.Parameter(W2.clone())

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        weights, ids = route(x)
        h = torch.relu(torch.einsum("th,tkhi->tki", x, (self.w1 * condition)[ids]))
        return (torch.einsum("tki,tkih->tkh", h, self.w2[ids]) * weights[..., None]).sum(1)


def test_a_table_that_depends_on_an_input_is_named() -> None:
    torch._dynamo.reset()
    with torch.no_grad():
        report = moe_fx.explain(Hyper(), X, torch.rand(HIDDEN), ranks=2)
    (declined,) = report.declined
    assert "an input that other ranks may have otherwise" in declined.reason


def test_a_table_that_chance_makes_is_named() -> None:
    def model(x: Tensor) -> Tensor:
        weights, ids = route(x)
        h = torch.relu(torch.einsum("th,tkhi->tki", x, F.dropout(W1, 0.1, training=True)[ids]))
        return (torch.einsum("tki,tkih->tkh", h, W2[ids]) * weights[..., None]).sum(1)

    (declined,) = explained(model).declined
    assert "made by chance (aten.dropout.default)" in declined.reason


def _chosen_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """``[E, C]``: each expert's share of what a token scores, and the tokens that it takes."""
    return torch.softmax(x @ GATE.t(), -1).t().topk(3)


def expert_choice_by_index(x: Tensor) -> Tensor:
    weights, tokens = _chosen_tokens(x)
    rows = torch.bmm(torch.relu(torch.bmm(x[tokens], W1)), W2) * weights[..., None]
    return torch.zeros_like(x).index_add(0, tokens.reshape(-1), rows.flatten(0, 1))


def expert_choice_by_one_hot(x: Tensor) -> Tensor:
    weights, tokens = _chosen_tokens(x)
    places = F.one_hot(tokens, x.shape[0]).to(x.dtype)
    rows = torch.bmm(torch.relu(torch.bmm(torch.einsum("ect,th->ech", places, x), W1)), W2)
    return torch.einsum("ect,ec,ech->th", places, weights, rows)


@pytest.mark.parametrize("layer", [expert_choice_by_index, expert_choice_by_one_hot])
def test_experts_that_choose_their_tokens_are_a_missed_layer(
    layer: Callable[[Tensor], Tensor],
) -> None:
    report = moe_fx.explain(layer, X)
    (missed,) = report.missed
    assert missed.reason.startswith("experts choose their tokens here")
    with pytest.raises(BackendCompilerFailed, match="experts choose their tokens"):
        torch.compile(layer, backend="moe_fx", options={"base": "eager", "strict": True})(X)


def test_attention_to_tokens_that_each_head_selects_is_no_missed_layer() -> None:
    """Scores ``[heads, T]``, and a matrix for each head: but nothing is put back by the indices."""

    def attention(x: Tensor) -> Tensor:
        _, tokens = (x @ GATE.t()).t().topk(3)
        return torch.bmm(x[tokens], W1).sum(1)

    assert moe_fx.explain(attention, X).missed == []
