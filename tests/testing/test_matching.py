"""assert_matches, assert_declined: they pass on what is there, and say what they saw otherwise."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from moe_fx.region import Router
from moe_fx.testing import assert_declined, assert_matches
from tests.testing.layers import Layer, LowestScores, arguments, tokens, two_layers

HERE = "tests/testing/layers.py:"


def test_a_layer_matches_and_the_report_is_returned() -> None:
    report = assert_matches(
        Layer(),
        [tokens(3, 4, 32)],
        num_experts=8,
        top_k=2,
        hidden_size=32,
        form="batched_mm",
        program="local",
        activation="silu",
        has_shared_expert=False,
        verified=True,
        router={"score": "softmax", "renormalise": False},
    )
    assert HERE in report.regions[0].source


def test_keyword_arguments_dynamic_shapes_and_ranks() -> None:
    report = assert_matches(
        Layer(), kwargs={"x": tokens(12, 32)}, dynamic=True, ranks=4, program="replicated"
    )
    assert report.regions[0].verification is not None
    assert report.regions[0].verification.ranks == 4
    assert report.plans[0].world_size == 4


def test_every_layer_must_match() -> None:
    assert_matches(two_layers, arguments(12, 32), layers=2, router=Router("softmax", verified=True))
    with pytest.raises(AssertionError, match="expected 1 MoE layer, found 2"):
        assert_matches(two_layers, arguments(12, 32))
    with pytest.raises(AssertionError) as caught:
        assert_matches(two_layers, arguments(12, 32), layers=2, top_k=3)
    assert len(re.findall(r"layer \d \(.*top_k: expected 3, found 2", str(caught.value))) == 2


def test_a_difference_is_named_with_the_layer_and_its_source() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_matches(
            Layer(), [tokens(12, 32)], num_experts=16, form="grouped_mm", router={"scale": 2.5}
        )
    message = str(caught.value)
    assert "num_experts: expected 16, found 8" in message
    assert "form: expected 'grouped_mm', found 'batched_mm'" in message
    assert "router.scale: expected 2.5, found 1.0" in message
    assert re.search(r"layer 1 \(/.*" + HERE, message)


def test_a_miss_shows_every_declined_candidate_with_reason_and_source() -> None:
    with pytest.raises(AssertionError) as caught:
        assert_matches(LowestScores(), [tokens(12, 32)], top_k=2)
    message = str(caught.value)
    assert message.startswith("expected 1 MoE layer, found 0")
    assert "declined: the selection takes the lowest scores" in message
    assert re.search(r"at node topk, /.*" + HERE, message)


def test_a_model_without_a_selection_says_so() -> None:
    with pytest.raises(AssertionError, match="No MoE layer found: no graph selects experts"):
        assert_matches(nn.Linear(4, 4), [torch.ones(2, 4)])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"topk": 2}, "Region has no field topk; it has num_experts, top_k"),
        ({"router": {"top_k": 2}}, "Router has no field top_k; it has score"),
        ({"parts": None}, "Region has no field parts"),
    ],
)
def test_a_field_that_does_not_exist_is_an_error_that_lists_them(
    fields: dict[str, object], said: str
) -> None:
    with pytest.raises(TypeError, match=re.escape(said)):
        assert_matches(Layer(), [tokens(12, 32)], **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("reason", ["lowest scores", re.compile(r"takes the \w+ scores$")])
def test_a_candidate_is_declined_for_a_reason(reason: str | re.Pattern[str]) -> None:
    declined = assert_declined(
        LowestScores(), [tokens(12, 32)], reason=reason, source="layers.py", nearest_form=""
    )
    assert declined.node == "topk"


def test_a_reason_given_as_text_is_no_pattern() -> None:
    with pytest.raises(AssertionError, match="no candidate declined"):
        assert_declined(LowestScores(), [tokens(12, 32)], reason="lowest .cores")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"reason": "rows mix"}, "reason 'rows mix'"),
        ({"reason": "lowest", "source": "other.py"}, "source 'other.py'"),
        ({"reason": "lowest", "nearest_form": "grouped_mm"}, "nearest form 'grouped_mm'"),
    ],
)
def test_declined_for_something_else_shows_what_was_declined(
    wanted: dict[str, str], said: str
) -> None:
    with pytest.raises(AssertionError) as caught:
        assert_declined(LowestScores(), [tokens(12, 32)], **wanted)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert "- declined: the selection takes the lowest scores" in str(caught.value)


def test_what_matches_is_not_declined() -> None:
    with pytest.raises(AssertionError, match="MoE layers found: 1, declined: 0"):
        assert_declined(Layer(), [tokens(12, 32)], reason="")
