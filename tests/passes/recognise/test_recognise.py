"""Recognise on real transformers blocks, and on siblings of an MoE forward that are not one."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.decorators import mark_unbacked
from torch.fx import GraphModule

from moe_fx.region import Declined, Region, Router
from moe_fx.report import Report
from moe_fx.testing import assert_matches
from tests.models import build, token_ids
from tests.passes.graphs import (
    Captured,
    block,
    captured,
    op_names,
    relative_error,
    rewritten,
    rewritten_on_ranks,
    run_ranks,
    tokens,
)
from tests.passes.grouped import Grouped

EXACT = 1e-5
WORLDS = (1, 2)
HIDDEN = 64


def equals_captured(case: Captured, world: int) -> Report:
    """Asserts that the rewritten graphs compute what the captured one does; returns the report."""
    graphs, report = rewritten_on_ranks(case.module, world)
    assert graphs is not None, report.declined
    inputs = [case.other_inputs(seed=10 + rank) for rank in range(world)]
    with torch.no_grad():
        expected = [case.module(*values) for values in inputs]
    assert relative_error(expected, run_ranks(graphs, inputs)) <= EXACT
    return report


# -- real blocks -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    router: Router
    activation: str
    shared: bool = False
    config: dict[str, Any] = field(default_factory=dict)


_DEEPSEEK = Router("sigmoid", True, 4, 2, True, 2.5, False, True)
BLOCKS = {
    "qwen3_moe": Expected(Router("softmax", renormalise=True, verified=True), "silu"),
    "deepseek_v3": Expected(_DEEPSEEK, "silu", shared=True),
    "gpt_oss": Expected(Router("softmax", renormalise=True, verified=True), "clamped_swiglu"),
    "nemotron_h": Expected(
        Router("sigmoid", True, renormalise=True, scale=2.5, verified=True), "relu2", shared=True
    ),
}
OTHER_TOKEN_COUNTS = {
    "as many tokens as experts": (8, 2),
    "as many pairs as experts": (4, 2),
    "as many tokens as selected experts": (2, 2),
    "as many tokens as hidden features": (HIDDEN, 2),
    "one expert per token": (12, 1),
    "one expert per token and as many tokens as experts": (8, 1),
    "one token": (1, 2),
    "one token with one expert": (1, 1),
}
SOME_COUNTS = ("as many tokens as experts", "one expert per token", "one token")
FORMS = [(family, "grouped_mm") for family in BLOCKS] + [("gpt_oss", "batched_mm")]


def check_fields(region: Region, family: str, form: str, top_k: int = 2) -> None:
    expected = BLOCKS[family]
    assert (region.num_experts, region.top_k, region.hidden_size) == (8, top_k, HIDDEN)
    assert region.form == form
    assert region.program in ("local", "replicated")  # on one rank, on several
    assert region.activation == expected.activation
    assert region.has_shared_expert == expected.shared
    assert f"/modeling_{family}.py:" in region.source
    assert region.verified


def check_router(region: Region, family: str) -> None:
    """A softmax over the selected logits is also one over all, renormalised: either is right."""
    assert replace(region.router, softmax_after_topk=False) == BLOCKS[family].router


@pytest.mark.parametrize("form", ["grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", BLOCKS)
def test_every_field_of_a_real_block_is_found(family: str, form: str) -> None:
    case = captured(block(family, form), tokens(2, 6, HIDDEN))
    (region,) = equals_captured(case, 1).regions
    check_fields(region, family, form)
    check_router(region, family)


def test_source_is_the_line_of_the_selection() -> None:
    case = captured(block("deepseek_v3"), tokens(2, 6, HIDDEN))
    (region,) = rewritten(case.module)[1].regions
    file, line = region.source.rsplit(":", 1)
    with open(file) as model:
        text = model.read().splitlines()[int(line) - 1]
    assert "torch.topk(scores_for_choice" in text


@pytest.mark.parametrize("family", BLOCKS)
def test_parts_name_tokens_ids_weights_tables_and_result(family: str) -> None:
    case = captured(block(family), tokens(2, 6, HIDDEN))
    (region,) = rewritten(case.module)[1].regions
    parts = region.parts
    assert tuple(parts.tokens.meta["val"].shape) == (12, HIDDEN)
    assert tuple(parts.ids.meta["val"].shape) == (12, 2)
    assert parts.ids.meta["val"].dtype == torch.int64
    assert parts.weights is not None
    assert tuple(parts.weights.meta["val"].shape) == (12, 2)
    assert tuple(parts.combined.meta["val"].shape) == (12, HIDDEN)
    assert {table.meta["val"].shape[0] for table in parts.tables} == {8}
    assert len(parts.tables) == (4 if family == "gpt_oss" else 2)
    assert (parts.tokens.name, parts.combined.name) == (region.input, region.output)
    assert parts.gathers == ()


@pytest.mark.parametrize(
    ("family", "count"),
    [("qwen3_moe", count) for count in OTHER_TOKEN_COUNTS]
    + [(family, count) for family in BLOCKS for count in SOME_COUNTS if family != "qwen3_moe"],
)
def test_token_counts_that_equal_other_sizes_change_nothing(family: str, count: str) -> None:
    num_tokens, top_k = OTHER_TOKEN_COUNTS[count]
    config = {} if top_k == 2 else {"num_experts_per_tok": top_k}
    case = captured(block(family, **config), tokens(1, num_tokens, HIDDEN))
    for world in WORLDS:
        (region,) = equals_captured(case, world).regions
        check_fields(region, family, "grouped_mm", top_k)
        assert region.router.score == BLOCKS[family].router.score


@pytest.mark.parametrize("count", ["one token", "as many tokens as experts"])
def test_gathered_weights_at_token_counts_that_equal_other_sizes(count: str) -> None:
    case = captured(block("gpt_oss", "batched_mm"), tokens(1, OTHER_TOKEN_COUNTS[count][0], HIDDEN))
    for world in WORLDS:
        (region,) = equals_captured(case, world).regions
        check_fields(region, "gpt_oss", "batched_mm")


@pytest.mark.parametrize(("family", "form"), FORMS)
def test_a_dynamic_graph_serves_other_token_counts(family: str, form: str) -> None:
    case = captured(block(family, form), tokens(2, 6, HIDDEN), dynamic=True)
    for world in WORLDS:
        (region,) = equals_captured(case, world).regions
        check_fields(region, family, form)
        check_router(region, family)


@pytest.mark.parametrize(("family", "form"), FORMS)
def test_an_unbacked_token_count_is_no_obstacle(family: str, form: str) -> None:
    example = tokens(1, 12, HIDDEN)
    mark_unbacked(example, 1)
    case = captured(block(family, form), example, dynamic=None)
    assert any(str(size).startswith("u") for size in _sizes(case.module))
    for world in WORLDS:
        (region,) = equals_captured(case, world).regions
        check_fields(region, family, form)
        check_router(region, family)


def _sizes(module: GraphModule) -> list[Any]:
    values = [node.meta.get("val") for node in module.graph.nodes]
    return [size for value in values if isinstance(value, Tensor) for size in value.shape]


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_every_layer_of_a_model_is_found_and_not_just_the_first(family: str) -> None:
    model, config = build(family)
    arguments = {"input_ids": token_ids(config, 1, 8), "use_cache": False}
    report = assert_matches(model, kwargs=arguments, layers=2, verified=True)
    assert report.declined == []
    first, second = report.regions
    assert (first.router, first.source) == (second.router, second.source)
    assert {first.input, first.output}.isdisjoint({second.input, second.output})
    assert not set(first.parts.nodes) & set(second.parts.nodes)
    assert set(first.parts.tables).isdisjoint(second.parts.tables)


# -- siblings of a grouped MoE forward that are none -----------------------------------------------


class DescendingSort(Grouped):
    """rows are sorted by descending expert id"""

    def sort(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sort(ids, descending=True)  # type: ignore[return-value]


class TokenByAnotherDivisor(Grouped):
    """// 3, expected the sort's permutation // 2"""

    def token_of_row(self, perm: Tensor) -> Tensor:
        return perm // (self.top_k + 1)


class TokenByRemainder(Grouped):
    """not the weighted sum of the experts' rows"""

    def token_of_row(self, perm: Tensor) -> Tensor:
        return perm % 12


class CountedInOtherBins(Grouped):
    """counted in 4 bins from 0 to 7, but|offsets are not the running sum of counts"""

    def counts(self, ids: Tensor) -> Tensor:
        return torch.histc(ids.float(), bins=4, min=0, max=7).repeat_interleave(2) / 2


class CountedOverAnotherRange(Grouped):
    """counted in 8 bins from 0 to 15, but|offsets are not the running sum of counts"""

    def counts(self, ids: Tensor) -> Tensor:
        return torch.histc(ids.float(), bins=8, min=0, max=15)


class CountedWithWeights(Grouped):
    """Each counts once."""

    def grouped(self, rows: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
        return torch.ops.moe_fx.grouped_mm(rows, table, offsets)

    def counts(self, ids: Tensor) -> Tensor:
        return torch.bincount(ids, weights=torch.ones(ids.shape[0]), minlength=8)


class CountsForOffsets(Grouped):
    """the grouped matmul's offsets are not the running sum of counts"""

    def offsets(self, counts: Tensor) -> Tensor:
        return counts.to(torch.int32)


class OffsetsSummedTwice(Grouped):
    """offsets are summed twice|offsets are not the running sum of counts"""

    def offsets(self, counts: Tensor) -> Tensor:
        return counts.cumsum(0, dtype=torch.int32).cumsum(0, dtype=torch.int32)


class OffsetsFromConstants(Grouped):
    """the grouped matmul's offsets are not the running sum of counts"""

    def offsets(self, counts: Tensor) -> Tensor:
        return torch.arange(3, 25, 3, dtype=torch.int32)


class WeightsInAnotherOrder(Grouped):
    """rows in pair order meet rows sorted by expert"""

    def weights_of_rows(self, weights: Tensor, perm: Tensor) -> Tensor:
        return weights.reshape(-1).unsqueeze(-1)


class WeightsPermutedTwice(Grouped):
    """A router's value that the rules have no name for."""

    def weights_of_rows(self, weights: Tensor, perm: Tensor) -> Tensor:
        return weights.reshape(-1)[perm][perm].unsqueeze(-1)


class BackByThePermutationItself(Grouped):
    """rows in sorted order are permuted from pair order"""

    def way_back(self, perm: Tensor) -> Tensor:
        return perm


class BackByAScatterOfOtherValues(Grouped):
    """scattered with values other than 0|aten.index.Tensor is not known to keep rows apart"""

    def way_back(self, perm: Tensor) -> Tensor:
        inverse = torch.empty_like(perm)
        inverse[perm] = torch.arange(perm.size(0)).flip(0)
        return inverse


class BackByADescendingArgsort(Grouped):
    """inverted by a descending argsort|aten.index.Tensor is not known to keep rows apart"""

    def way_back(self, perm: Tensor) -> Tensor:
        return perm.argsort(descending=True)


class NeverBack(Grouped):
    """rows are grouped by token while still sorted by expert"""

    def way_back(self, perm: Tensor) -> Tensor:
        return torch.arange(perm.size(0))

    def combine(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows.view(x.shape[0], self.top_k, self.hidden).sum(dim=1)

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.select(self.scores(x))
        expert_ids, perm = self.sort(ids.reshape(-1))
        offsets = self.offsets(self.counts(expert_ids))
        out = self.grouped(self.dispatch(x, perm, weights), self.gate_up, offsets)
        return self.combine(out, x)


class ExpertRowsAreCentred(Grouped):
    """the experts' rows are also read by mean"""

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        hidden = super().between(rows, weights)
        return hidden - hidden.mean(0)


class ConstantThatVariesFromRowToRow(Grouped):
    """varies from row to row in a way not known"""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Parameter(torch.randn(24, self.width))

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        return super().between(rows, weights) + self.noise


class SoftmaxOverRows(Grouped):
    """aten.softmax.int works across rows"""

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        return super().between(rows, weights).softmax(0)


class RunningSumOverRows(Grouped):
    """aten.cumsum.default works across rows"""

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        return super().between(rows, weights).cumsum(0)


class RowsReversed(Grouped):
    """aten.flip.default works across rows"""

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        return super().between(rows, weights).flip(0)


class RowsMixedByAReshape(Grouped):
    """mixes rows"""

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        hidden = super().between(rows, weights)
        return hidden.view(-1, 2 * self.width).tanh().view(-1, self.width)


class RowsShifted(Grouped):
    """aten.roll.default is not known to keep rows apart"""

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        return super().between(rows, weights).roll(1, 0)


class ExpertRowsEscape(Grouped):
    """the experts' rows are also read by output"""

    def result(self, combined: Tensor, rows: Tensor) -> Any:
        return combined, rows


class HiddenRowsEscape(Grouped):
    """the experts' rows are also read by abs"""

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        hidden = super().between(rows, weights)
        self.largest = hidden.abs().amax()
        return hidden

    def result(self, combined: Tensor, rows: Tensor) -> Any:
        return combined, self.largest


class WeightsBeforeTheFirstMatmul(Grouped):
    """routing weights multiply the rows before an expert matmul"""

    def dispatch(self, x: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
        rows = x[self.token_of_row(perm)]
        return rows * weights.reshape(-1)[perm].unsqueeze(-1)


class WeightsBetweenTheMatmuls(Grouped):
    """The last matmul is linear: the same as after it."""

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.select(self.scores(x))
        expert_ids, perm = self.sort(ids.reshape(-1))
        offsets = self.offsets(self.counts(expert_ids))
        rows = self.grouped(self.dispatch(x, perm, weights), self.gate_up, offsets)
        hidden = self.between(rows, weights) * self.weights_of_rows(weights, perm)
        out = self.grouped(hidden, self.down, offsets)
        return self.combine(out[self.way_back(perm)], x)


class TwoTokenTensors(Grouped):
    """expected one dispatched token tensor, found square, x"""

    def dispatch(self, x: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
        at = self.token_of_row(perm)
        return x[at] + x.square()[at]


class RowsWithoutTokens(Grouped):
    """the grouped matmul's rows are not the dispatched tokens"""

    def dispatch(self, x: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
        return x.repeat(self.top_k, 1)


class RowsNotSorted(Grouped):
    """the grouped matmul's rows are not sorted by expert"""

    def dispatch(self, x: Tensor, perm: Tensor, weights: Tensor) -> Tensor:
        return x.repeat_interleave(self.top_k, 0)


class SummedOverTokens(Grouped):
    """aten.sum.dim_IntList works across rows"""

    def combine(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows.view(x.shape[0], self.top_k, self.hidden).sum(dim=0)


class SlotsAveraged(Grouped):
    """aten.mean.dim works across rows"""

    def combine(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows.view(x.shape[0], self.top_k, self.hidden).mean(dim=1)


class SlotsFirst(Grouped):
    """mixes rows"""

    def combine(self, rows: Tensor, x: Tensor) -> Tensor:
        return rows.view(self.top_k, x.shape[0], self.hidden).sum(dim=0)


class LowestScores(Grouped):
    """the selection takes the lowest scores"""

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.topk(self.top_k, dim=-1, largest=False)  # type: ignore[return-value]


class ExpertsChooseTokens(Grouped):
    """picks tokens (dim 0), not experts"""

    def forward(self, x: Tensor) -> Any:
        scores = self.scores(x)
        weights, chosen = scores.topk(3, dim=0)  # [3, E]
        rows = x[chosen.t().reshape(-1)].view(self.num_experts, 3, self.hidden)
        out = self.between(torch.bmm(rows, self.gate_up), weights) @ self.down
        weighted = (out * weights.t().unsqueeze(-1)).view(-1, self.hidden)
        return torch.zeros_like(x).index_add(0, chosen.t().reshape(-1), weighted)


class ScoresOfOneToken(Grouped):
    """the selection is over [8], expected [tokens, experts]"""

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.scores(x)[0].topk(self.top_k, dim=-1)
        return weights * ids


class Sampling(Grouped):
    """the selected indices never bring tokens to experts"""

    def forward(self, x: Tensor) -> Any:
        values, indices = (x @ self.router).topk(4, dim=-1)
        best = values.softmax(-1).cumsum(-1).gt(0.5).float().argmax(-1, keepdim=True)
        return indices.gather(-1, best)


class TopScoresOnly(Grouped):
    """the selected indices never bring tokens to experts"""

    def forward(self, x: Tensor) -> Any:
        return self.scores(x).topk(self.top_k, dim=-1).values.sum(-1)


class ProductKeyMemory(Grouped):
    """the selected indices never bring tokens to experts"""

    def forward(self, x: Tensor) -> Any:
        left, right = x.chunk(2, dim=-1)
        score_a, at_a = (left @ self.router[:16]).topk(2, dim=-1)
        score_b, at_b = (right @ self.router[16:]).topk(2, dim=-1)
        scores = (score_a[:, :, None] + score_b[:, None, :]).view(-1, 4)
        slots = (at_a[:, :, None] * self.num_experts + at_b[:, None, :]).view(-1, 4)
        best, among = scores.topk(2, dim=-1)
        values = F.embedding(slots.gather(-1, among), self.memory)
        return (best.softmax(-1).unsqueeze(-1) * values).sum(1)

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Parameter(torch.randn(self.num_experts**2, self.hidden))


class TablesOfAnotherSize(Grouped):
    """expert ids select from"""

    num_tables = 12

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.select(self.scores(x))
        rows = x.repeat_interleave(self.top_k, 0).unsqueeze(1)
        rows = torch.bmm(rows, self.gate_up[ids.reshape(-1)]).squeeze(1)
        return self.combine(rows * weights.reshape(-1).unsqueeze(-1), x)


class BiasTableOfAnotherSize(Grouped):
    """expert ids select from|varies from row to row"""

    def __init__(self) -> None:
        super().__init__()
        self.long_bias = nn.Parameter(torch.randn(9, self.hidden))

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.select(self.scores(x))
        expert_ids, perm = self.sort(ids.reshape(-1))
        offsets = self.offsets(self.counts(expert_ids))
        out = self.grouped(self.dispatch(x, perm, weights), self.gate_up, offsets)
        out = (out + self.long_bias[expert_ids]) * self.weights_of_rows(weights, perm)
        return self.combine(out[self.way_back(perm)], x)


class NoExpert(Grouped):
    """the weighted rows are not the experts' result"""

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.select(self.scores(x))
        _, perm = self.sort(ids.reshape(-1))
        rows = self.dispatch(x, perm, weights) * self.weights_of_rows(weights, perm)
        return self.combine(rows[self.way_back(perm)], x)


class SummedTwice(Grouped):
    """the experts' rows are summed in more than one place"""

    def combine(self, rows: Tensor, x: Tensor) -> Tensor:
        grouped = rows.view(x.shape[0], self.top_k, self.hidden)
        return grouped.sum(1) + grouped.square().sum(1)


class BiasAfterTheWeights(Grouped):
    """expected one result of the experts that is weighted"""

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.select(self.scores(x))
        expert_ids, perm = self.sort(ids.reshape(-1))
        offsets = self.offsets(self.counts(expert_ids))
        out = self.grouped(self.dispatch(x, perm, weights), self.gate_up, offsets)
        out = out * self.weights_of_rows(weights, perm) + self.bias[expert_ids]
        return self.combine(out[self.way_back(perm)], x)


class IdsOfTwoSelections(Grouped):
    """expected one matrix of expert ids that dispatches rows"""

    def forward(self, x: Tensor) -> Any:
        weights, ids = self.select(self.scores(x))
        perm = self.sort(ids.reshape(-1))[1]
        others = (self.num_experts - 1 - ids).reshape(-1)
        offsets = self.offsets(self.counts(others))
        out = self.grouped(self.dispatch(x, perm, weights), self.gate_up, offsets)
        out = out * self.weights_of_rows(weights, perm)
        return self.combine(out[self.way_back(perm)], x)


class Dropout(Grouped):
    """a random op (aten.dropout.default with p=0.5) takes part between dispatch and combine"""

    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        return F.dropout(super().between(rows, weights), 0.5, training=True)


REJECTED = (
    *(DescendingSort, TokenByAnotherDivisor, TokenByRemainder, CountedInOtherBins),
    *(CountedOverAnotherRange, CountsForOffsets, OffsetsSummedTwice),
    *(OffsetsFromConstants, WeightsInAnotherOrder),
    *(BackByThePermutationItself, BackByAScatterOfOtherValues, BackByADescendingArgsort, NeverBack),
    *(ExpertRowsAreCentred, ConstantThatVariesFromRowToRow, SoftmaxOverRows, RunningSumOverRows),
    *(RowsReversed, RowsMixedByAReshape, RowsShifted, ExpertRowsEscape, HiddenRowsEscape),
    *(WeightsBeforeTheFirstMatmul, TwoTokenTensors, RowsWithoutTokens),
    *(RowsNotSorted, SummedOverTokens, SlotsAveraged, SlotsFirst, LowestScores),
    *(ExpertsChooseTokens, ScoresOfOneToken, Sampling, TopScoresOnly, ProductKeyMemory),
    *(TablesOfAnotherSize, BiasTableOfAnotherSize, NoExpert, SummedTwice, BiasAfterTheWeights),
    *(IdsOfTwoSelections, Dropout),
)


def source_lines(sibling: type[Grouped]) -> set[str]:
    lines: set[str] = set()
    for owner in (Grouped, sibling):
        text, start = inspect.getsourcelines(owner)
        lines |= {f"{inspect.getsourcefile(owner)}:{start + at}" for at in range(len(text))}
    return lines


def check_declined(declined: Declined, sibling: type[Grouped], graph: GraphModule) -> None:
    assert declined.node in {node.name for node in graph.graph.nodes}
    assert declined.source in source_lines(sibling)


@pytest.mark.parametrize("sibling", REJECTED, ids=lambda sibling: sibling.__name__)
def test_rejects(sibling: type[Grouped]) -> None:
    case = captured(sibling(), tokens(12, 32))
    for verify in ("off", "compile"):
        graph, report = rewritten(case.module, verify=verify)
        assert graph is None
        assert report.regions == []
        assert report.declined
        phrases = (sibling.__doc__ or "").split("|")
        reasons = [declined.reason for declined in report.declined]
        assert any(phrase in reason for phrase in phrases for reason in reasons), reasons
        for declined in report.declined:
            check_declined(declined, sibling, case.module)


@pytest.mark.parametrize(
    "sibling", [CountedWithWeights, WeightsPermutedTwice, WeightsBetweenTheMatmuls]
)
def test_what_no_rule_knows_is_read_by_value(sibling: type[Grouped]) -> None:
    for world in WORLDS:
        report = equals_captured(captured(sibling(), tokens(12, 32)), world)
        assert len(report.regions) == 1


class Plain(Grouped):
    pass


class SoftmaxOverTokensInTheRouter(Grouped):
    def scores(self, x: Tensor) -> Tensor:
        return F.softmax(x @ self.router, 0)


class IdsShifted(Grouped):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.topk(self.top_k, dim=-1)
        return weights, (ids + 1).clamp(max=self.num_experts - 1)


class WeightsSquaredAndCentred(Grouped):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.topk(self.top_k, dim=-1)
        return weights.square() - weights.mean(0), ids


class WeightsOfReversedSlots(Grouped):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.topk(self.top_k, dim=-1)
        return weights.flip(-1), ids


class WeightedTwice(Grouped):
    def weigh(self, rows: Tensor, weights: Tensor) -> Tensor:
        return rows * weights * weights


class WeightsAdded(Grouped):
    def weigh(self, rows: Tensor, weights: Tensor) -> Tensor:
        return weights - rows.tanh()


class NoWeights(Grouped):
    def weigh(self, rows: Tensor, weights: Tensor) -> Tensor:
        return rows


class WeightedByToken(Grouped):
    def forward(self, x: Tensor) -> Any:
        weights, ids = self.select(self.scores(x))
        expert_ids, perm = self.sort(ids.reshape(-1))
        offsets = self.offsets(self.counts(expert_ids))
        out = self.grouped(self.dispatch(x, perm, weights), self.gate_up, offsets)
        rows = out[self.way_back(perm)].view(x.shape[0], self.top_k, self.hidden)
        return (rows * weights.unsqueeze(-1)).sum(1)


class ResidualOfTheOwnRow(Grouped):
    def forward(self, x: Tensor) -> Any:
        weights, ids = self.select(self.scores(x))
        expert_ids, perm = self.sort(ids.reshape(-1))
        offsets = self.offsets(self.counts(expert_ids))
        rows = self.dispatch(x, perm, weights)
        out = self.grouped(rows, self.gate_up, offsets) + rows + self.bias[expert_ids]
        out = out * self.weights_of_rows(weights, perm)
        return self.combine(out[self.way_back(perm)], x)


class NormalisedRows(Grouped):
    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        hidden = super().between(rows, weights)
        hidden = F.layer_norm(hidden, (self.width,)) + hidden.softmax(-1)
        return hidden / hidden.abs().amax(-1, keepdim=True)


class SlicedAndConcatenatedRows(Grouped):
    def between(self, rows: Tensor, weights: Tensor) -> Tensor:
        gate, up = rows[:, ::2], rows[:, 1::2]
        return torch.cat([gate[:, 8:], gate[:, :8]], -1).sigmoid() * up.flip(-1)


class InverseByArgsort(Grouped):
    def way_back(self, perm: Tensor) -> Tensor:
        return perm.argsort()


class InverseByScatter(Grouped):
    def way_back(self, perm: Tensor) -> Tensor:
        return torch.zeros_like(perm).scatter(0, perm, torch.arange(perm.size(0)))


class CountedWithBincount(Grouped):
    def grouped(self, rows: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
        return torch.ops.moe_fx.grouped_mm(rows, table, offsets)

    def counts(self, ids: Tensor) -> Tensor:
        return torch.bincount(ids, minlength=self.num_experts)


class TransposedTables(Grouped):
    def grouped(self, rows: Tensor, table: Tensor, offsets: Tensor) -> Tensor:
        flipped = table.transpose(1, 2).contiguous().transpose(1, 2) * 2
        return super().grouped(rows, flipped, offsets)


ACCEPTED = (
    *(Plain, SoftmaxOverTokensInTheRouter, IdsShifted, WeightsSquaredAndCentred),
    *(WeightsOfReversedSlots, WeightedTwice, WeightsAdded, NoWeights, WeightedByToken),
    *(ResidualOfTheOwnRow, NormalisedRows, SlicedAndConcatenatedRows, InverseByArgsort),
    *(InverseByScatter, CountedWithBincount, TransposedTables),
)


@pytest.mark.parametrize("sibling", ACCEPTED, ids=lambda sibling: sibling.__name__)
def test_accepts_and_computes_the_same(sibling: type[Grouped]) -> None:
    case = captured(sibling(), tokens(12, 32))
    for world in WORLDS:
        report = equals_captured(case, world)
        assert len(report.regions) == 1
        assert report.declined == []
    graph, _ = rewritten(case.module)
    assert graph is not None
    assert not any("grouped_mm_fallback" in op for op in op_names(graph))


def test_a_declined_layer_does_not_keep_others_from_being_rewritten() -> None:
    good, bad = Plain(), DescendingSort()
    case = captured(lambda x: good(x) + bad(x), tokens(12, 32))
    for world in WORLDS:
        report = equals_captured(case, world)
        assert len(report.regions) == 1
        (declined,) = report.declined
        assert "descending" in declined.reason
