"""The router's fields are read off the graph and reproduce its values, or it is called custom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_fx.passes.recognise.router import router
from moe_fx.region import Router
from tests.passes.graphs import (
    Captured,
    block,
    captured,
    relative_error,
    rewritten_on_ranks,
    run_ranks,
    tokens,
)
from tests.passes.grouped import Grouped

SOFTMAX = Router("softmax", verified=True)
SIGMOID = Router("sigmoid", verified=True)
CUSTOM = Router()


def router_of(case: Captured, tolerance: float = 1e-5) -> Router:
    """The router found, which must be the same on two ranks; asserts that the rewrite is right."""
    found = []
    for world in (1, 2):
        graphs, report = rewritten_on_ranks(case.module, world)
        assert graphs is not None, report.declined
        inputs = [case.other_inputs(seed=40 + rank) for rank in range(world)]
        with torch.no_grad():
            expected = [case.module(*values) for values in inputs]
        assert relative_error(expected, run_ranks(graphs, inputs)) <= tolerance
        found += [region.router for region in report.regions]
    first, second = found
    assert first == second
    return first


# -- written by hand -------------------------------------------------------------------------------


class Softmax(Grouped):
    renormalise, scale, eps = False, 1.0, 0.0

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.topk(self.top_k, dim=-1)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdim=True) + self.eps)
        return weights * self.scale if self.scale != 1.0 else weights, ids


class SoftmaxRenormalised(Softmax):
    renormalise = True


class SoftmaxScaled(Softmax):
    scale = 1.75


class SoftmaxRenormalisedAndScaled(Softmax):
    renormalise, scale, eps = True, 16.0, 1e-20


class Sigmoid(Softmax):
    def scores(self, x: Tensor) -> Tensor:
        return (x @ self.router).sigmoid()


class SigmoidRenormalisedAndScaled(Sigmoid):
    renormalise, scale = True, 0.5


class Biased(Softmax):
    """The bias moves the selection, not the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.correction = nn.Parameter(torch.linspace(-0.2, 0.2, self.num_experts))

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        ids = (scores + self.correction).topk(self.top_k, dim=-1).indices
        return scores.gather(1, ids), ids


class BiasedSigmoid(Biased):
    def scores(self, x: Tensor) -> Tensor:
        return (x @ self.router).sigmoid()


class SoftplusRoot(Grouped):
    def scores(self, x: Tensor) -> Tensor:
        return F.softplus(x @ self.router).sqrt()


class SharpenedSoftmax(Softmax):
    def scores(self, x: Tensor) -> Tensor:
        return ((x @ self.router) * 3).softmax(-1)


class Cosine(Grouped):
    def scores(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) @ F.normalize(self.router, dim=0)


class SigmoidOfTheSelected(Biased):
    """Kolibri: the bias is added to the logits, the sigmoid runs over the selected ones."""

    def scores(self, x: Tensor) -> Tensor:
        return x @ self.router

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        ids = (scores + self.correction).topk(self.top_k, dim=-1).indices
        return scores.gather(1, ids).sigmoid(), ids


class ScaledPerExpert(Biased):
    """Gemma 4."""

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.topk(self.top_k, dim=-1)
        return weights / weights.sum(-1, keepdim=True) * self.correction[ids], ids


class ScaledByAParameter(SoftmaxRenormalised):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor([3.0]))

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().select(scores)
        return weights * 2.0 * self.gain, ids


class SoftmaxOfTheSelected(Grouped):
    def scores(self, x: Tensor) -> Tensor:
        return x @ self.router

    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        values, ids = scores.topk(self.top_k, dim=-1)
        return values.softmax(-1), ids


TEMPLATES = {
    Softmax: SOFTMAX,
    SoftmaxRenormalised: replace(SOFTMAX, renormalise=True),
    SoftmaxScaled: replace(SOFTMAX, scale=1.75),
    SoftmaxRenormalisedAndScaled: replace(SOFTMAX, renormalise=True, scale=16.0),
    Sigmoid: SIGMOID,
    SigmoidRenormalisedAndScaled: replace(SIGMOID, renormalise=True, scale=0.5),
    Biased: replace(SOFTMAX, select_bias=True),
    BiasedSigmoid: replace(SIGMOID, select_bias=True),
    SoftmaxOfTheSelected: replace(SOFTMAX, renormalise=True),
    SoftplusRoot: replace(SOFTMAX, score="softplus_sqrt"),
    Cosine: replace(SOFTMAX, score="logits"),
    SharpenedSoftmax: replace(SOFTMAX, logit_scale=3.0),
    SigmoidOfTheSelected: replace(SIGMOID, select_bias=True, select_on_logits=True),
    ScaledPerExpert: replace(SOFTMAX, renormalise=True, expert_scale=True),
    ScaledByAParameter: replace(SOFTMAX, renormalise=True, scale=2.0, learned_scale=True),
}


@pytest.mark.parametrize("layer", TEMPLATES, ids=lambda layer: layer.__name__)
def test_fields_of_a_router_of_the_template(layer: type[Grouped]) -> None:
    router = router_of(captured(layer(), tokens(12, 32)))
    assert replace(router, softmax_after_topk=False) == TEMPLATES[layer]


@pytest.mark.parametrize("layer", [SoftmaxRenormalised, BiasedSigmoid])
def test_fields_are_found_in_a_dynamic_graph(layer: type[Grouped]) -> None:
    assert router_of(captured(layer(), tokens(12, 32), dynamic=True)) == TEMPLATES[layer]


@pytest.mark.parametrize("layer", [SoftmaxRenormalised, Biased, BiasedSigmoid])
def test_fields_are_found_in_a_graph_for_one_token(layer: type[Grouped]) -> None:
    assert router_of(captured(layer(), tokens(1, 32))) == TEMPLATES[layer]


# -- of real models --------------------------------------------------------------------------------

_DEEPSEEK = {"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 4, "topk_group": 2}
_V3 = Router("sigmoid", True, 4, 2, True, 2.5, verified=True)
_V2 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.0}
REAL: dict[str, tuple[str, dict[str, Any], Router]] = {
    "deepseek_v3": ("deepseek_v3", _DEEPSEEK, _V3),
    "deepseek_v3 without renormalisation": (
        "deepseek_v3",
        _DEEPSEEK | {"norm_topk_prob": False},
        replace(_V3, renormalise=False),
    ),
    "deepseek_v3 without scale": (
        "deepseek_v3",
        _DEEPSEEK | {"routed_scaling_factor": 1.0},
        replace(_V3, scale=1.0),
    ),
    "deepseek_v3 with one of two groups": (
        "deepseek_v3",
        _DEEPSEEK | {"n_group": 2, "topk_group": 1},
        replace(_V3, num_groups=2, topk_group=1),
    ),
    "deepseek_v3 without groups": (
        "deepseek_v3",
        _DEEPSEEK | {"n_group": 1, "topk_group": 1},
        replace(_V3, num_groups=1, topk_group=1),
    ),
    "deepseek_v2 greedy": (
        "deepseek_v2",
        _V2 | {"topk_method": "greedy", "routed_scaling_factor": 1.5},
        replace(SOFTMAX, scale=1.5),
    ),
    "deepseek_v2 limited to groups by their best": (
        "deepseek_v2",
        _V2 | {"topk_method": "group_limited_greedy"},
        replace(SOFTMAX, num_groups=4, topk_group=2),
    ),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": True}, replace(SOFTMAX, renormalise=True)),
    "qwen3_moe without renormalisation": ("qwen3_moe", {"norm_topk_prob": False}, SOFTMAX),
    "gpt_oss": ("gpt_oss", {}, replace(SOFTMAX, renormalise=True)),
}


@pytest.mark.parametrize("name", REAL)
def test_fields_of_a_real_router(name: str) -> None:
    family, config, expected = REAL[name]
    router = router_of(captured(block(family, **config), tokens(1, 12, 64)))
    assert replace(router, softmax_after_topk=False) == expected


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v2 greedy", "qwen3_moe", "gpt_oss"])
def test_fields_of_a_router_in_bfloat16(name: str) -> None:
    family, config, expected = REAL[name]
    module = block(family, dtype=torch.bfloat16, **config)
    case = captured(module, tokens(1, 12, 64, dtype=torch.bfloat16))
    router = router_of(case, tolerance=5e-2)
    assert router.scale == pytest.approx(expected.scale, rel=1e-2)
    assert replace(router, softmax_after_topk=False, scale=expected.scale) == expected


# -- not of the template ---------------------------------------------------------------------------


class SoftmaxOfSigmoid(Grouped):
    def scores(self, x: Tensor) -> Tensor:
        return (x @ self.router).sigmoid().softmax(-1)


class BiasThatAlsoWeighs(Biased):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        return (scores + self.correction).topk(self.top_k, dim=-1)  # type: ignore[return-value]


class WeightsOfReversedSlots(Softmax):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.topk(self.top_k, dim=-1)
        return weights.flip(-1), ids


class TwoLayerRouter(Grouped):
    def scores(self, x: Tensor) -> Tensor:
        return ((x @ self.router).tanh() @ self.router[: self.num_experts]).softmax(-1)


class HashOfTheScores(Softmax):
    def select(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = scores.topk(self.top_k, dim=-1)
        return weights, (ids * 5 + 3) % self.num_experts


class Softcapped(Softmax):
    def scores(self, x: Tensor) -> Tensor:
        return ((x @ self.router).tanh() * 3).softmax(-1)


ODD = (SoftmaxOfSigmoid, BiasThatAlsoWeighs, WeightsOfReversedSlots, HashOfTheScores, Softcapped)


@pytest.mark.parametrize("layer", ODD, ids=lambda layer: layer.__name__)
def test_an_odd_router_is_custom_and_its_layer_rewritten_all_the_same(
    layer: type[Grouped],
) -> None:
    router = router_of(captured(layer(), tokens(12, 32)))
    assert "no known" in router.note
    assert replace(router, note="") == CUSTOM


def test_a_router_of_two_layers_is_named_by_its_last() -> None:
    assert router_of(captured(TwoLayerRouter(), tokens(12, 32))) == SOFTMAX


# -- equal layers ----------------------------------------------------------------------------------


class Layers(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize(
    ("layers", "fits"),
    [((Biased, Biased, Biased), 1), ((Softmax, SoftmaxScaled, Softmax), 2)],
)
def test_equal_routers_are_fitted_once(
    monkeypatch: pytest.MonkeyPatch, layers: tuple[type[Grouped], ...], fits: int
) -> None:
    fitted: list[Router] = []
    original = router.fit

    def counting(*args: Any) -> Router:
        fitted.append(original(*args))
        return fitted[-1]

    monkeypatch.setattr(router, "fit", counting)
    case = captured(Layers(*(layer() for layer in layers)), tokens(12, 32))
    graphs, report = rewritten_on_ranks(case.module, 1)
    assert graphs is not None
    assert [region.router for region in report.regions] == [TEMPLATES[layer] for layer in layers]
    assert len(fitted) == fits
