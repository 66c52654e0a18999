"""Layers that read more than tokens and weights: what the passes accept is right for all values of
what they read, and what is not is declined with its reason, not found out when the graph runs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.proofs.layers import EXPERTS, SPELLINGS, loop, outcome, random, route, weights
from tests.proofs.situations import (
    MAPS_WITH_NO_EXPERT,
    MASK_DTYPES,
    MASKS,
    NO_EXPERT,
    SITUATIONS,
    masked_by,
)

FEW = settings(
    max_examples=8, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


def test_an_integer_mask_on_the_weights_of_a_loop_is_right() -> None:
    found = masked_by(torch.int64, **MASKS["weights multiplied"]).outcome("loop")
    assert found.verdict == "equal"
    assert "integers" in {effect.kind for effect in found.effects}


def test_a_table_pruned_by_a_mask_of_bools_is_right() -> None:
    found = SITUATIONS["a table pruned by a mask"].outcome("loop")
    assert found.verdict == "equal"
    assert "bools" in {effect.kind for effect in found.effects}


@FEW
@given(
    spelling=st.sampled_from(list(SPELLINGS)),
    place=st.sampled_from(list(MASKS)),
    dtype=st.sampled_from(list(MASK_DTYPES)),
)
def test_a_mask_of_any_dtype_anywhere_is_right_in_every_spelling(
    spelling: str, place: str, dtype: str
) -> None:
    found = masked_by(MASK_DTYPES[dtype], **MASKS[place]).outcome(spelling)
    assert found.verdict == "equal", found


@pytest.mark.grid
@pytest.mark.parametrize("dtype", MASK_DTYPES)
@pytest.mark.parametrize("place", MASKS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_mask_is_right(spelling: str, place: str, dtype: str) -> None:
    found = masked_by(MASK_DTYPES[dtype], **MASKS[place]).outcome(spelling)
    assert found.verdict == "equal", found


@pytest.mark.parametrize(
    ("spelling", "which"), [("loop", "-1"), ("gathered", "-1"), ("grouped", "one beyond")]
)
def test_ids_that_the_model_gives_to_no_expert_are_declined(spelling: str, which: str) -> None:
    found = masked_by(torch.bool, ids=NO_EXPERT[which]).outcome(spelling)
    assert found.verdict == "declined"
    assert "ids" in found.reasons[0]
    assert str(EXPERTS) in found.reasons[0]


@pytest.mark.parametrize("name", MAPS_WITH_NO_EXPERT)
@pytest.mark.parametrize("spelling", ["loop", "gathered", "grouped"])
def test_a_map_that_gives_ids_of_no_expert_is_declined(name: str, spelling: str) -> None:
    assert MAPS_WITH_NO_EXPERT[name].outcome(spelling).verdict == "declined"


@FEW
@given(spelling=st.sampled_from(list(SPELLINGS)), name=st.sampled_from(list(SITUATIONS)))
def test_other_inputs_are_right_in_every_spelling(spelling: str, name: str) -> None:
    assert SITUATIONS[name].outcome(spelling).verdict == "equal"


@pytest.mark.grid
@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_situation_is_right(spelling: str, name: str) -> None:
    found = SITUATIONS[name].outcome(spelling)
    assert found.verdict == "equal", found


def test_a_table_of_ids_with_one_of_no_expert_is_declined_with_its_range() -> None:
    matrices = weights()
    table = torch.tensor([[0, 1], [2, -1], [1, 3], [2, 3]])

    def layer(x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor, of: Tensor, key: Tensor) -> Tensor:
        ids = of[key]
        return loop(x, torch.sigmoid(x @ gate.t()).gather(1, ids.clamp(min=0)), ids, w1, w2)

    def values(seed: int) -> tuple[Tensor, ...]:
        key = torch.randint(4, (10,), generator=torch.Generator().manual_seed(seed))
        return (
            random(10, 16, seed=seed),
            matrices["w1"],
            matrices["w2"],
            matrices["gate"],
            table,
            key,
        )

    found = outcome(layer, values(0), values)
    assert found.verdict == "declined"
    assert "holds ids from -1 to 3, and there are 4 experts" in found.reasons[0]


def test_an_input_without_an_effect_leaves_the_layer_unproved() -> None:
    matrices = weights()

    def layer(x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        w, ids = route(x, gate)
        return loop(x, w + 0 * bias[ids], ids, w1, w2)

    def values(seed: int) -> tuple[Tensor, ...]:
        tensors = (matrices["w1"], matrices["w2"], matrices["gate"], random(EXPERTS, seed=seed))
        return (random(10, 16, seed=seed), *tensors)

    found = outcome(layer, values(0), values)
    assert found.verdict == "declined"
    assert found.reasons[0].startswith("unproved: ")
