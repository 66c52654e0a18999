"""Where MoE layers may start: every spelling of a selection is found, and only selections are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moe_fx
from moe_fx.graph.copy import copy_graph
from moe_fx.graph.selectors import may_select_experts
from moe_fx.passes.recognise.anchors import find_anchors
from moe_fx.passes.recognise.selection import select
from moe_fx.region import Region, Router
from tests.families import build, inputs
from tests.passes.graphs import (
    Captured,
    block,
    captured,
    relative_error,
    rewritten,
    rewritten_on_ranks,
    run_ranks,
    tokens,
)
from tests.passes.grouped import Grouped

SOFTMAX = Router("softmax", verified=True)


def region_of(case: Captured, other: list[Any] | None = None) -> Region:
    """The one region found; asserts that the rewrite for one and two ranks computes the same."""
    for world in (1, 2):
        graphs, report = rewritten_on_ranks(case.module, world)
        assert graphs is not None, report.declined
        assert report.declined == []
        inputs = [other or case.other_inputs(seed=40 + rank) for rank in range(world)]
        with torch.no_grad():
            expected = [case.module(*values) for values in inputs]
        assert relative_error(expected, run_ranks(graphs, inputs)) <= 1e-5
    (region,) = report.regions
    return region


# -- found -----------------------------------------------------------------------------------------


class ByArgmax(Grouped):
    top_k = 1

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        ids = scores.argmax(-1)
        return scores.gather(1, ids.unsqueeze(1)).squeeze(1), ids


class ByMax(Grouped):
    top_k = 1

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.max(dim=-1)
        return weights, ids


class ByMaxKeepingTheDim(Grouped):
    top_k = 1

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return scores.max(dim=-1, keepdim=True)  # type: ignore[return-value]


class BySort(Grouped):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.sort(dim=-1, descending=True)
        return weights[:, : self.top_k], ids[:, : self.top_k]


class ByArgsort(Grouped):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        ids = scores.argsort(dim=-1, descending=True)[:, : self.top_k]
        return scores.gather(1, ids), ids


class PerBatch(Grouped):
    """Scores ``[B, S, E]``; ids and weights go straight to ``[B * S * K]``."""

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.view(2, -1, self.num_experts).topk(self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True), ids


class PerBatchByArgmax(Grouped):
    top_k = 1

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        scores = scores.view(2, -1, self.num_experts)
        ids = scores.argmax(-1)
        return scores.gather(2, ids.unsqueeze(2)).squeeze(2), ids


class TwoMaxima(Grouped):
    """Each expert by a selection of its own: nothing says that they differ."""

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        first, at = scores.max(dim=-1, keepdim=True)
        second, at2 = (scores * 0.5).max(dim=-1, keepdim=True)
        return torch.cat([first, second], -1), torch.cat([at, at2], -1)


FOUND: dict[type[Grouped], Router] = {
    ByArgmax: SOFTMAX,
    ByMax: SOFTMAX,
    ByMaxKeepingTheDim: SOFTMAX,
    BySort: SOFTMAX,
    ByArgsort: SOFTMAX,
    PerBatch: replace(SOFTMAX, renormalise=True),
    PerBatchByArgmax: SOFTMAX,
    TwoMaxima: Router(note="no known selection gives the captured ids"),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("layer", FOUND, ids=lambda layer: layer.__name__)
def test_a_selection_is_found_whatever_spells_it(layer: type[Grouped], dynamic: bool) -> None:
    region = region_of(captured(layer(), tokens(12, 32), dynamic=dynamic))
    assert (region.num_experts, region.top_k) == (8, layer.top_k)
    assert region.router == FOUND[layer]
    assert region.parts.distinct == (layer is not TwoMaxima)


class ByHash(Grouped):
    """DeepSeek-V4: a table of token ids says which experts a token meets."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.table: Tensor
        self.register_buffer(
            "table", torch.randint(self.num_experts, (16, self.top_k), generator=generator)
        )

    def forward(self, x: Tensor, token_ids: Tensor) -> Any:  # type: ignore[override]
        self.token_ids = token_ids
        return super().forward(x)

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        ids = self.table[self.token_ids]
        return scores.gather(1, ids), ids


def test_expert_ids_from_a_table_of_token_ids() -> None:
    token_ids = torch.randint(16, (12,), generator=torch.Generator().manual_seed(3))
    case = captured(ByHash(), tokens(12, 32), token_ids)
    region = region_of(case, case.inputs)
    assert (region.num_experts, region.top_k) == (8, 2)
    assert region.router == replace(SOFTMAX, selection="lookup")
    assert not region.parts.distinct


class WithZeroExperts(Grouped):
    """Two more columns than experts: tokens that choose one are to be left as they are."""

    def __init__(self) -> None:
        super().__init__()
        extra = torch.randn((self.hidden, 2), generator=torch.Generator().manual_seed(5))
        self.wide = nn.Parameter(torch.cat([self.router.detach(), extra], 1))

    def scores(self, x: Tensor) -> Tensor:
        return F.softmax(x @ self.wide, -1)

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.topk(self.top_k, dim=-1)
        none = ids >= self.num_experts
        return weights.masked_fill(none, 0.0), ids.masked_fill(none, 0)


class ZeroExpertsDispatched(WithZeroExperts):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.topk(self.top_k, dim=-1)
        none = ids == self.num_experts  # the other one is forgotten
        return weights.masked_fill(none, 0.0), ids.masked_fill(none, 0)


def test_zero_experts_are_no_experts() -> None:
    region = region_of(captured(WithZeroExperts(), tokens(12, 32)))
    assert (region.num_experts, region.top_k) == (8, 2)
    assert region.router == replace(SOFTMAX, zero_experts=2)
    assert not region.parts.distinct


def test_ids_that_may_be_of_no_expert_are_declined() -> None:
    case = captured(ZeroExpertsDispatched(), tokens(12, 32))
    graphs, report = rewritten_on_ranks(case.module, 1)
    assert graphs is None
    (declined,) = report.declined
    assert declined.reason == "ids from 0 to 9 are dispatched to 8 experts"


def test_selections_of_groups_and_of_experts_are_one_router() -> None:
    module = block("deepseek_v3", n_group=4, topk_group=2)
    graph = copy_graph(captured(module, tokens(1, 12, 64)).module).graph
    (anchor,) = find_anchors(graph)
    assert [n.args[1] for n in anchor.selectors] == [2]
    topk = torch.ops.aten.topk.default
    assert len(graph.find_nodes(op="call_function", target=topk)) == 3


@pytest.mark.parametrize(
    ("label", "experts", "top_k"),
    [("llama4", 8, 2), ("doge", 16, 2), ("vitpose_backbone", 4, 1)],
)
def test_selections_of_dense_forms(label: str, experts: int, top_k: int) -> None:
    """Dense masks, a product-key memory, and experts by an id that comes from outside."""
    module, _ = build(label)
    case = captured(module, *inputs(label))
    assert may_select_experts(case.dynamo)
    (anchor,) = find_anchors(copy_graph(case.module).graph)
    selection = select(anchor)
    assert (selection.num_experts, selection.top_k) == (experts, top_k)
    assert anchor.certain == (label != "vitpose_backbone")


# -- not found -------------------------------------------------------------------------------------


class GreedyDecoding(Grouped):
    def forward(self, x: Tensor) -> Any:
        return F.embedding((x @ self.router).argmax(-1), self.bias)


class LastTokenPooling(Grouped):
    def forward(self, x: Tensor) -> Any:
        return x[(x @ self.router).argmax(0)]


class HardGumbel(Grouped):
    def forward(self, x: Tensor) -> Any:
        soft = self.scores(x)
        at = soft.max(-1, keepdim=True)[1]
        return torch.zeros_like(soft).scatter(-1, at, 1.0) - soft.detach() + soft


class RelativePosition(Grouped):
    def forward(self, x: Tensor) -> Any:
        where = torch.arange(12)[:, None] - torch.arange(12)[None, :]
        return x @ F.embedding(where.clamp(0, 7), self.bias).sum(0).mT[:32, :8]


class TokenTypes(Grouped):
    def forward(self, x: Tensor) -> Any:
        kinds = (x > 0).long().sum(-1) % 2
        return torch.where((kinds == 0)[:, None], x, -x) * (kinds == 1)[:, None]


class NucleusSampling(Grouped):
    def forward(self, x: Tensor) -> Any:
        probs, order = self.scores(x).sort(dim=-1, descending=True)
        kept = (probs.cumsum(-1) - probs) < 0.9
        return torch.zeros_like(probs).scatter(1, order, probs * kept)


NOT_FOUND = (
    *(GreedyDecoding, LastTokenPooling, HardGumbel, RelativePosition, TokenTypes),
    NucleusSampling,
)


@pytest.mark.parametrize("layer", NOT_FOUND, ids=lambda layer: layer.__name__)
def test_indices_that_dispatch_nothing_are_no_candidate(layer: type[Grouped]) -> None:
    case = captured(layer(), tokens(12, 32))
    for report in (moe_fx.explain(layer(), tokens(12, 32)), rewritten(case.module)[1]):
        assert (report.regions, report.declined) == ([], [])


@pytest.mark.parametrize("layer", [GreedyDecoding, LastTokenPooling, RelativePosition])
def test_a_graph_without_signs_of_experts_is_not_captured(layer: type[Grouped]) -> None:
    assert not may_select_experts(captured(layer(), tokens(12, 32)).dynamo)


@pytest.mark.parametrize("layer", [*FOUND, WithZeroExperts], ids=lambda layer: layer.__name__)
def test_a_graph_with_experts_is_captured(layer: type[Grouped]) -> None:
    assert may_select_experts(captured(layer(), tokens(12, 32)).dynamo)


class GivesAParameterOtherStorage(Grouped):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(self.hidden, self.num_experts, bias=False)

    def scores(self, x: Tensor) -> Tensor:
        self.gate.weight.data = self.gate.weight.to(torch.float64).to(torch.float32)
        return self.gate(x).softmax(-1)  # type: ignore[no-any-return]


class CastsItsRouter(GivesAParameterOtherStorage):
    """As Switch Transformers do."""

    def scores(self, x: Tensor) -> Tensor:
        self.gate = self.gate.to(torch.float32)
        return self.gate(x).softmax(-1)  # type: ignore[no-any-return]


ONE_GRAPH = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="torch 2.11 runs module.to() outside of the graph"
)


@pytest.mark.parametrize(
    "layer", [GivesAParameterOtherStorage, pytest.param(CastsItsRouter, marks=ONE_GRAPH)]
)
def test_a_graph_with_no_functional_form_is_declined(layer: type[Grouped]) -> None:
    report = moe_fx.explain(layer(), tokens(12, 32))
    assert report.regions == []
    (declined,) = report.declined
    assert "other storage" in declined.reason
    assert "test_anchors.py:" in declined.source
