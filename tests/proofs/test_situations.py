"""Layers that read more than tokens and weights: what the passes accept is right for all values of
what they read, and what is not is declined with its reason, not found out when the graph runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.proofs.layers import (
    EXPERTS,
    SPELLINGS,
    Outcome,
    loop,
    outcome,
    random,
    route,
    weights,
)
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


def test_a_length_that_all_tokens_of_this_rank_are_below_is_seen_as_on_other_ranks() -> None:
    found = SITUATIONS["a length behind all tokens"].outcome("loop")
    assert found.verdict == "equal", found.reasons
    assert "integers" in {effect.kind for effect in found.effects}


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


@pytest.mark.parametrize("which", NO_EXPERT)
def test_ids_that_the_model_gives_to_no_expert_count_for_nothing_in_a_loop(which: str) -> None:
    assert masked_by(torch.bool, ids=NO_EXPERT[which]).outcome("loop").verdict == "equal"


@pytest.mark.parametrize(("spelling", "which"), [("gathered", "-1"), ("grouped", "one beyond")])
def test_ids_that_the_model_gives_to_no_expert_are_declined_elsewhere(
    spelling: str, which: str
) -> None:
    found = masked_by(torch.bool, ids=NO_EXPERT[which]).outcome(spelling)
    assert found.verdict == "declined"
    assert "ids" in found.reasons[0]
    assert str(EXPERTS) in found.reasons[0]


@pytest.mark.parametrize("name", MAPS_WITH_NO_EXPERT)
@pytest.mark.parametrize("spelling", ["loop", "gathered", "grouped"])
def test_a_map_that_gives_ids_of_no_expert_is_right_or_declined(name: str, spelling: str) -> None:
    verdict = MAPS_WITH_NO_EXPERT[name].outcome(spelling).verdict
    assert verdict == ("equal" if spelling == "loop" else "declined")


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


# -- what only some values show --------------------------------------------------------------------


def _of_tokens(function: Any, later: Any) -> Outcome:
    """``function(x, w1, w2, gate)``, captured with plain tokens, then run on ``later(seed)``."""
    matrices = weights()

    def values(seed: int) -> tuple[Tensor, ...]:
        x = later(seed) if seed else random(10, 16, seed=0)
        return (x, matrices["w1"], matrices["w2"], matrices["gate"])

    return outcome(function, values(0), values, worlds=(1,))


def test_a_limit_on_weighted_rows_that_few_tokens_reach_is_declined() -> None:
    def layer(x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor) -> Tensor:
        w, ids = route(x, gate / 1000)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            rows = (torch.relu(x @ w1[e]) @ w2[e]) * (w * (ids == e)).sum(-1, keepdim=True)
            out = out + rows.clamp(-1000.0, 1000.0)
        return out

    found = _of_tokens(layer, lambda seed: 1e4 * random(10, 16, seed=seed))
    assert found.verdict == "declined"


def test_padding_that_the_tokens_themselves_show_is_right() -> None:
    def layer(x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor) -> Tensor:
        w, ids = route(x, gate)
        padding = x.abs().sum(-1, keepdim=True) == 0
        return loop(x, w, ids.masked_fill(padding, -1), w1, w2)

    def padded(seed: int) -> Tensor:
        x = random(10, 16, seed=seed)
        x[seed % 10] = 0
        return x

    assert _of_tokens(layer, padded).verdict == "equal"


def test_a_small_change_of_rows_in_bfloat16_is_declined() -> None:
    matrices = {name: tensor.bfloat16() for name, tensor in weights().items()}

    def layer(x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor) -> Tensor:
        w, ids = route(x, gate)
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            rows = (torch.relu(x @ w1[e]) @ w2[e]) * (w * (ids == e)).sum(-1, keepdim=True)
            out = out + rows + 0.02 * torch.tanh(rows)
        return out

    values = (random(10, 16).bfloat16(), matrices["w1"], matrices["w2"], matrices["gate"])
    assert outcome(layer, values, lambda seed: values).verdict == "declined"


def test_an_expert_that_a_map_makes_come_up_twice_counts_once_where_it_does_so() -> None:
    matrices = weights()

    def layer(x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor, to: Tensor) -> Tensor:
        scores = torch.softmax(x @ gate.t(), -1)
        ids = to[scores.topk(2)[1]]
        out = torch.zeros_like(x)
        for e in range(EXPERTS):
            hit = (ids == e).any(-1, keepdim=True)
            out = out + hit * scores[:, e : e + 1] * (torch.relu(x @ w1[e]) @ w2[e])
        return out

    def values(seed: int) -> tuple[Tensor, ...]:
        to = torch.tensor([2, 0, 3, 1] if not seed else [0, 0, 1, 1])
        return (random(10, 16, seed=seed), matrices["w1"], matrices["w2"], matrices["gate"], to)

    assert outcome(layer, values(0), values).verdict == "equal"


@pytest.mark.parametrize("limit", [1e-6, 1e-9])
def test_weighted_rows_that_vanish_below_a_limit_are_declined(limit: float) -> None:
    def layer(x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor) -> Tensor:
        w, ids = route(x, gate)
        hidden = torch.relu(torch.einsum("th,tkhf->tkf", x, w1[ids]))
        rows = torch.einsum("tkf,tkfh->tkh", hidden, w2[ids]) * w[..., None]
        return torch.nn.functional.hardshrink(rows, limit).sum(1)

    found = _of_tokens(layer, lambda seed: limit * random(10, 16, seed=seed))
    assert found.verdict == "declined"


def test_weighted_rows_that_are_rounded_on_their_way_are_declined() -> None:
    def layer(x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor) -> Tensor:
        w, ids = route(x, gate)
        hidden = torch.relu(torch.einsum("th,tkhf->tkf", x, w1[ids]))
        rows = torch.einsum("tkf,tkfh->tkh", hidden, w2[ids]) * w[..., None]
        return rows.half().float().sum(1)

    found = _of_tokens(layer, lambda seed: random(10, 16, seed=seed))
    assert found.verdict == "declined"
    assert found.reasons == ("weighted rows are rounded to torch.float16 on their way",)
