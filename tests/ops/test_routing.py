"""route, expert_counts, permute, unpermute: against plain Python, torch_npu's words, opcheck."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

import moe_fx.ops  # noqa: F401  (registers the ops)

ops = torch.ops.moe_fx

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}
IDS = torch.tensor([[2, 0], [1, 2], [2, 2], [0, 1], [3, 2]])
"""Five tokens, two experts each, of four; one token twice to the same expert."""

property_test = settings(max_examples=50, deadline=None)


@st.composite
def routings(draw: st.DrawFn, min_tokens: int = 0) -> tuple[Tensor, int]:
    """(ids [T, K], number of experts); any expert may be empty, a token may name one twice."""
    num_tokens = draw(st.integers(min_tokens, 9))
    num_experts = draw(st.integers(1, 8))
    top_k = draw(st.integers(1, 4))
    size = num_tokens * top_k
    flat = draw(st.lists(st.integers(0, num_experts - 1), min_size=size, max_size=size))
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    return torch.tensor(flat, dtype=dtype).view(num_tokens, top_k), num_experts


def distinct_tokens(num_tokens: int, hidden: int, dtype: torch.dtype) -> Tensor:
    """Every entry another integer, exact in each of ``DTYPES``."""
    return torch.arange(num_tokens * hidden, dtype=dtype).view(num_tokens, hidden) + 1


def sorted_pairs(ids: Tensor) -> list[int]:
    """Pair numbers by expert, pairs of one expert in their order: what ``permute`` promises."""
    flat = ids.flatten().tolist()
    buckets: dict[int, list[int]] = {expert: [] for expert in sorted(set(flat))}
    for pair, expert in enumerate(flat):
        buckets[expert].append(pair)
    return [pair for bucket in buckets.values() for pair in bucket]


def weighted_sum(rows: Tensor, row_map: Tensor, weights: Tensor | None, num_tokens: int) -> Tensor:
    """``unpermute``, one pair at a time, in float64. Pairs whose row was dropped add nothing."""
    out = torch.zeros(num_tokens, *rows.shape[1:], dtype=torch.float64)
    top_k = row_map.numel() // max(num_tokens, 1)
    for pair, row in enumerate(row_map.tolist()):
        if row < len(rows):
            weight = 1.0 if weights is None else weights[pair // top_k, pair % top_k].double()
            out[pair // top_k] += rows[row].double() * weight
    return out


# -- route -----------------------------------------------------------------------------------------

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid, bias, groups, renormalised, scaled": {
        "score": "sigmoid",
        "select_bias": torch.linspace(-1, 1, 8),
        "num_groups": 4,
        "topk_group": 2,
        "renormalise": True,
        "eps": 1e-20,
        "scale": 2.5,
    },
    "topk_softmax": {"score": "topk_softmax"},
    "best of a group": {"num_groups": 4, "topk_group": 2, "group_score": "max"},
}


@pytest.mark.parametrize("router", ROUTERS)
def test_route_passes_opcheck(router: str) -> None:
    torch.manual_seed(0)
    opcheck(ops.route, (torch.randn(5, 8, requires_grad=True), 3), ROUTERS[router])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gating_top_k_training_has_the_gradients_of_route(score: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(7, 8, requires_grad=True)
    groups = (torch.linspace(-1, 1, 8), 4, 2, "top2")
    renormalise = score == "sigmoid"
    weights, ids = ops.gating_top_k_training(logits, 3, score, *groups, 1e-20, 2.5)
    right, right_ids = ops.route(logits, 3, score, *groups, renormalise, 1e-20, 2.5)
    assert torch.equal(ids, right_ids)
    grad = torch.randn_like(weights)
    made, expected = (torch.autograd.grad(each, logits, grad)[0] for each in (weights, right))
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-7)
    opcheck(ops.gating_top_k_training, (logits, 3, score, *groups, 1e-20, 2.5))


def test_route_softmax_takes_the_likeliest_experts_and_their_probabilities() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 8, dtype=torch.bfloat16)
    weights, ids = ops.route(logits, 3)
    expected = logits.float().softmax(-1).topk(3)
    assert weights.dtype == torch.float32 and ids.dtype == torch.int64
    assert torch.equal(ids, expected.indices)
    assert torch.equal(weights, expected.values)


def test_route_topk_softmax_normalises_over_the_selected_only() -> None:
    torch.manual_seed(0)
    logits = torch.randn(6, 8)
    weights, ids = ops.route(logits, 3, "topk_softmax")
    assert torch.equal(ids, logits.topk(3).indices)
    torch.testing.assert_close(weights, logits.topk(3).values.softmax(-1))


def test_route_bias_moves_the_selection_and_not_the_weights() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    bias = torch.tensor([0.0, 0.0, 0.0, 10.0])
    weights, ids = ops.route(logits, 2, "sigmoid", bias)
    assert ids.tolist() == [[3, 0]]
    torch.testing.assert_close(weights, logits.sigmoid()[:, [3, 0]])


@pytest.mark.parametrize(("group_score", "group"), [("top2", 1), ("max", 0)])
def test_route_selects_only_from_the_best_groups(group_score: str, group: int) -> None:
    logits = torch.tensor([[0.9, 0.0, 0.0, 0.7, 0.6, 0.0]]).logit(eps=1e-6)  # best; best two
    _, ids = ops.route(logits, 2, "sigmoid", num_groups=2, topk_group=1, group_score=group_score)
    assert {expert // 3 for expert in ids[0].tolist()} == {group}


def test_route_renormalises_before_it_scales() -> None:
    torch.manual_seed(0)
    weights, _ = ops.route(torch.randn(6, 8), 3, renormalise=True, scale=2.5)
    torch.testing.assert_close(weights.sum(-1), torch.full((6,), 2.5))


def test_route_accepts_zero_tokens() -> None:
    weights, ids = ops.route(torch.empty(0, 8), 3, **ROUTERS["topk_softmax"])
    assert weights.shape == ids.shape == (0, 3)


def test_route_names_a_score_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="'tanh'"):
        ops.route(torch.randn(2, 4), 2, "tanh")


# -- expert_counts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [IDS, IDS.int(), IDS[:0]], ids=["int64", "int32", "no tokens"])
def test_expert_counts_passes_opcheck(ids: Tensor) -> None:
    opcheck(ops.expert_counts, (ids, 5))


@property_test
@given(routings())
def test_expert_counts_counts_each_expert(routing: tuple[Tensor, int]) -> None:
    ids, num_experts = routing
    counted = Counter(ids.flatten().tolist())
    counts = ops.expert_counts(ids, num_experts)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [counted[expert] for expert in range(num_experts)]


def test_an_id_past_the_last_expert_is_an_error_that_names_it() -> None:
    with pytest.raises(RuntimeError, match=r"expert id is 7.*4 experts \(ids 0 to 3\)"):
        ops.expert_counts(torch.tensor([[0, 7]]), 4)


def test_a_negative_id_is_an_error_that_names_it() -> None:
    with pytest.raises(RuntimeError, match=r"expert id is -2.*4 experts \(ids 0 to 3\)"):
        ops.expert_counts(torch.tensor([[0, -2]]), 4)


# -- permute ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_out_tokens", [None, 10, 6, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_permute_passes_opcheck(num_out_tokens: int | None, dtype: torch.dtype) -> None:
    tokens = distinct_tokens(5, 3, dtype).requires_grad_()
    opcheck(ops.permute, (tokens, IDS, num_out_tokens))


def test_permute_of_zero_tokens_passes_opcheck() -> None:
    opcheck(ops.permute, (torch.empty(0, 3, requires_grad=True), IDS[:0]))


@pytest.mark.parametrize("num_out_tokens", [None, 6])
def test_permute_has_the_gradient_of_its_formula(num_out_tokens: int | None) -> None:
    tokens = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)

    def rows(tokens: Tensor) -> Tensor:
        return ops.permute(tokens, IDS, num_out_tokens)[0]

    assert torch.autograd.gradcheck(rows, tokens)


@property_test
@given(routings(), st.integers(1, 5), st.sampled_from(DTYPES))
def test_permute_sorts_rows_by_expert_and_keeps_the_order_of_equals(
    routing: tuple[Tensor, int], hidden: int, dtype: torch.dtype
) -> None:
    ids, _ = routing
    tokens = distinct_tokens(len(ids), hidden, dtype)
    rows, _ = ops.permute(tokens, ids)
    expected = [tokens[pair // ids.shape[1]] for pair in sorted_pairs(ids)]
    assert rows.dtype == dtype
    assert torch.equal(rows, torch.stack(expected) if expected else tokens)


@property_test
@given(routings(), st.data())
def test_row_map_is_torch_npus_sorted_indices(
    routing: tuple[Tensor, int], data: st.DataObject
) -> None:
    """int32, T·K long even when truncated; ``rows[row_map[i]] == tokens[i // K]`` for rows kept;
    the first ``num_out_tokens`` rows are kept; ``argsort(argsort(ids))``, so a permutation."""
    ids, _ = routing
    top_k = ids.shape[1]
    tokens = distinct_tokens(len(ids), 2, torch.float32)
    kept = data.draw(st.none() | st.integers(1, ids.numel())) if ids.numel() else None
    rows, row_map = ops.permute(tokens, ids, kept)
    assert row_map.dtype == torch.int32
    assert row_map.shape == (ids.numel(),)
    assert len(rows) == (ids.numel() if kept is None else kept)
    assert sorted(row_map.tolist()) == list(range(ids.numel()))
    first = torch.argsort(ids.flatten(), stable=True)
    assert torch.equal(row_map.long(), torch.argsort(first, stable=True))
    for pair, row in enumerate(row_map.tolist()):
        if row < len(rows):
            assert torch.equal(rows[row], tokens[pair // top_k])


def test_permute_takes_one_expert_per_token_without_the_slot_dimension() -> None:
    tokens, ids = distinct_tokens(5, 3, torch.float32), IDS[:, 0]
    got, expected = ops.permute(tokens, ids), ops.permute(tokens, ids[:, None])
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


def test_permute_moves_rows_of_any_shape() -> None:
    flat = distinct_tokens(5, 6, torch.float32)
    rows, _ = ops.permute(flat.view(5, 2, 3), IDS)
    assert torch.equal(rows.view(10, 6), ops.permute(flat, IDS)[0])


@pytest.mark.parametrize(("num_out_tokens", "kept"), [(0, 10), (12, 10), (-3, 7)])
def test_num_out_tokens_out_of_range_means_what_torch_npu_documents(
    num_out_tokens: int, kept: int
) -> None:
    """0 drops nothing, more than there are keeps all, a negative one counts from the end."""
    tokens = distinct_tokens(5, 3, torch.float32)
    rows, _ = ops.permute(tokens, IDS, num_out_tokens)
    assert torch.equal(rows, ops.permute(tokens, IDS)[0][:kept])
    opcheck(ops.permute, (tokens, IDS, num_out_tokens))


# -- unpermute -------------------------------------------------------------------------------------


def unpermute_arguments(
    dtype: torch.dtype, weight_dtype: torch.dtype | None, num_rows: int = 10
) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
    torch.manual_seed(0)
    _, row_map = ops.permute(torch.empty(5, 3), IDS)
    rows = torch.randn(num_rows, 3, dtype=dtype, requires_grad=True)
    weights = None
    if weight_dtype is not None:
        weights = torch.rand(5, 2, dtype=weight_dtype, requires_grad=True)
    return rows, row_map, weights, [5, 3]


UNPERMUTES: dict[str, tuple[Any, ...]] = {
    "weighted": (torch.float64, torch.float64),
    "weighted float32": (torch.float32, torch.float32),
    "weighted bfloat16 by float32": (torch.bfloat16, torch.float32),
    "sum": (torch.float64, None),
    "sum float32": (torch.float32, None),
    "truncated, weighted": (torch.float64, torch.float64, 6),
    "truncated, weighted float32": (torch.float32, torch.float32, 6),
    "truncated sum": (torch.float64, None, 6),
}


@pytest.mark.parametrize("case", UNPERMUTES)
def test_unpermute_passes_opcheck(case: str) -> None:
    opcheck(ops.unpermute, unpermute_arguments(*UNPERMUTES[case]))


@pytest.mark.parametrize("case", UNPERMUTES)
def test_unpermute_grad_passes_opcheck(case: str) -> None:
    rows, row_map, weights, shape = unpermute_arguments(*UNPERMUTES[case])
    grad = torch.randn(shape, dtype=ops.unpermute(rows, row_map, weights, shape).dtype)
    saved = (None, None) if weights is None else (rows.detach(), weights.detach())
    opcheck(ops.unpermute_grad, (grad, row_map, *saved, 5, list(rows.shape), rows.dtype))


@pytest.mark.parametrize("case", [case for case in UNPERMUTES if "32" not in case])
def test_unpermute_has_the_gradient_of_its_formula(case: str) -> None:
    rows, row_map, weights, shape = unpermute_arguments(*UNPERMUTES[case])
    differentiable = (rows,) if weights is None else (rows, weights)

    def combined(rows: Tensor, weights: Tensor | None = None) -> Tensor:
        return ops.unpermute(rows, row_map, weights, shape)

    assert torch.autograd.gradcheck(combined, differentiable)


@pytest.mark.parametrize("case", UNPERMUTES)
def test_unpermute_adds_up_each_tokens_rows(case: str) -> None:
    rows, row_map, weights, shape = unpermute_arguments(*UNPERMUTES[case])
    combined = ops.unpermute(rows, row_map, weights, shape)
    expected = weighted_sum(rows, row_map, weights, shape[0])
    dtype = rows.dtype if weights is None else torch.promote_types(rows.dtype, weights.dtype)
    assert combined.dtype == dtype
    torch.testing.assert_close(combined, expected.to(dtype))


@property_test
@given(routings(), st.integers(1, 5), st.sampled_from(DTYPES), st.data())
def test_unpermute_with_weights_that_sum_to_one_undoes_permute(
    routing: tuple[Tensor, int], hidden: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    ids, _ = routing
    parts = data.draw(
        st.lists(st.integers(1, 9), min_size=ids.numel(), max_size=ids.numel()), label="weights"
    )
    weights = torch.tensor(parts, dtype=torch.float64).view(ids.shape)
    weights = (weights / weights.sum(-1, keepdim=True)).to(dtype)
    tokens = distinct_tokens(len(ids), hidden, dtype)
    rows, row_map = ops.permute(tokens, ids)
    back = ops.unpermute(rows, row_map, weights, tokens.shape)
    torch.testing.assert_close(back, tokens, rtol=TOLERANCE[dtype], atol=0)


@property_test
@given(routings(min_tokens=1), st.sampled_from(DTYPES), st.booleans(), st.data())
def test_a_dropped_row_adds_nothing(
    routing: tuple[Tensor, int], dtype: torch.dtype, weighted: bool, data: st.DataObject
) -> None:
    ids, _ = routing
    kept = data.draw(st.integers(1, ids.numel()))
    tokens = distinct_tokens(len(ids), 2, dtype)
    weights = torch.full(ids.shape, 0.5, dtype=dtype) if weighted else None
    rows, row_map = ops.permute(tokens, ids, kept)
    combined = ops.unpermute(rows, row_map, weights, tokens.shape)
    expected = weighted_sum(rows, row_map, weights, len(ids)).to(dtype)
    torch.testing.assert_close(combined, expected, rtol=TOLERANCE[dtype], atol=0)


@property_test
@given(routings(min_tokens=1), st.booleans(), st.data())
def test_gradients_of_permute_and_unpermute_are_those_of_indexing(
    routing: tuple[Tensor, int], weighted: bool, data: st.DataObject
) -> None:
    ids, _ = routing
    num_tokens, top_k = ids.shape
    kept = data.draw(st.integers(1, ids.numel()))
    torch.manual_seed(0)
    tokens = torch.randn(num_tokens, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(num_tokens, top_k, dtype=torch.float64, requires_grad=True)
    target = torch.randn(num_tokens, 3, dtype=torch.float64)

    rows, row_map = ops.permute(tokens, ids, kept)
    used = weights if weighted else None
    loss = (ops.unpermute(rows.square(), row_map, used, tokens.shape) * target).sum()

    present = (row_map < kept).view(num_tokens, top_k, 1)
    picked = tokens.square()[:, None] * present
    expected = ((picked * weights[..., None] if weighted else picked).sum(1) * target).sum()
    inputs = (tokens, weights) if weighted else (tokens,)
    torch.testing.assert_close(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs)
    )


@pytest.mark.parametrize("weighted", [True, False])
def test_zero_tokens_travel_there_and_back_and_have_gradients(weighted: bool) -> None:
    tokens = torch.empty(0, 3, requires_grad=True)
    weights = torch.empty(0, 2, requires_grad=True)
    rows, row_map = ops.permute(tokens, IDS[:0])
    combined = ops.unpermute(rows, row_map, weights if weighted else None, tokens.shape)
    assert rows.shape == combined.shape == (0, 3)
    assert row_map.shape == (0,) and row_map.dtype == torch.int32
    grads = torch.autograd.grad(combined.sum(), (tokens, weights) if weighted else (tokens,))
    assert [tuple(g.shape) for g in grads] == [(0, 3), (0, 2)][: len(grads)]


def test_unpermute_of_zero_tokens_passes_opcheck() -> None:
    rows = torch.empty(0, 3, requires_grad=True)
    row_map = torch.empty(0, dtype=torch.int32)
    opcheck(ops.unpermute, (rows, row_map, torch.empty(0, 2, requires_grad=True), [0, 3]))


def test_unpermute_grad_of_zero_tokens_passes_opcheck() -> None:
    row_map = torch.empty(0, dtype=torch.int32)
    opcheck(ops.unpermute_grad, (torch.empty(0, 3), row_map, None, None, 0, [0, 3], torch.float32))


def test_rows_that_are_scalars_have_a_gradient_without_weights() -> None:
    _, row_map = ops.permute(torch.empty(5), IDS)
    rows = torch.randn(10, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.unpermute(rows, row_map, None, [5]).sum(), rows)
    assert torch.equal(grad, torch.ones(10, dtype=torch.float64))


def test_a_token_whose_rows_were_all_dropped_has_a_zero_weight_gradient() -> None:
    _, row_map = ops.permute(torch.empty(5, 3), IDS)
    rows = torch.empty(0, 3, requires_grad=True)
    weights = torch.rand(5, 2, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.unpermute(rows, row_map, weights, [5, 3]).sum(), weights)
    assert torch.equal(grad, torch.zeros(5, 2))
