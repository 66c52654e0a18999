"""regroup and grouped_mm: against loops in plain Python, gradcheck and opcheck."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from moe_fx.ops import experts

ops = torch.ops.moe_fx

property_test = settings(max_examples=50, deadline=None)

COUNTS = torch.tensor([[2, 0, 1], [3, 1, 0], [0, 0, 0]])
"""Rows received from each of three ranks for each of three local experts."""

GROUPED = {
    "aligned float32": (torch.float32, 8, 4),
    "unaligned float32": (torch.float32, 6, 5),
    "float64": (torch.float64, 8, 4),
    "bfloat16": (torch.bfloat16, 16, 8),
    "unaligned bfloat16": (torch.bfloat16, 6, 5),
}
"""Name: dtype, features in, features out. torch groups the first and the fourth itself."""

EXPERT_ROWS = [3, 0, 4, 0]
"""Rows of each expert; the second and the last have none."""


def offsets_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


def grouped_arguments(
    dtype: torch.dtype, features_in: int, features_out: int, counts: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    rows = torch.randn(sum(counts), features_in, dtype=dtype, requires_grad=True)
    weight = torch.randn(len(counts), features_in, features_out, dtype=dtype, requires_grad=True)
    return rows, weight, offsets_of(counts)


def each_by_its_expert(rows: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``grouped_mm``, one expert at a time, differentiable."""
    ends = [0, *offsets.tolist()]
    parts = [rows[a:b] @ weight[expert] for expert, (a, b) in enumerate(pairwise(ends))]
    return torch.cat(parts)


# -- regroup ---------------------------------------------------------------------------------------


@st.composite
def received(draw: st.DrawFn) -> Tensor:
    """Counts [W, L], many of them zero."""
    world, local = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    count = st.sampled_from([0, 0, 0, 1, 2, 5])
    flat = draw(st.lists(count, min_size=world * local, max_size=world * local))
    return torch.tensor(flat).view(world, local)


def labelled_rows(counts: Tensor) -> list[tuple[int, int, int]]:
    """(expert, source rank, number) of each row as rows arrive: by source, then by expert."""
    world, local = counts.shape
    return [
        (expert, source, number)
        for source in range(world)
        for expert in range(local)
        for number in range(int(counts[source, expert]))
    ]


@property_test
@given(received(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_regroup_orders_rows_by_expert_then_source_and_keeps_their_order(
    counts: Tensor, dtype: torch.dtype
) -> None:
    labels = labelled_rows(counts)
    arrived = torch.tensor(labels, dtype=dtype).view(-1, 3)
    rows, row_map = ops.regroup(arrived, counts)
    assert rows.dtype == dtype
    assert [tuple(row) for row in rows.int().tolist()] == sorted(labels)
    assert row_map.dtype == torch.int32
    assert torch.equal(rows[row_map.long()], arrived), "row_map goes back"


@property_test
@given(received())
def test_unpermute_by_regroups_map_gives_the_rows_as_they_arrived(counts: Tensor) -> None:
    arrived = torch.randn(int(counts.sum()), 3)
    rows, row_map = ops.regroup(arrived, counts)
    assert torch.equal(ops.unpermute(rows, row_map, None, arrived.shape), arrived)


@pytest.mark.parametrize("counts", [COUNTS, COUNTS * 0], ids=["some rows", "no rows"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_regroup_passes_opcheck(counts: Tensor, dtype: torch.dtype) -> None:
    rows = torch.randn(int(counts.sum()), 3, dtype=dtype, requires_grad=True)
    opcheck(ops.regroup, (rows, counts))


def test_regroup_has_the_gradient_of_its_formula() -> None:
    rows = torch.randn(int(COUNTS.sum()), 3, dtype=torch.float64, requires_grad=True)

    def regrouped(rows: Tensor) -> Tensor:
        return ops.regroup(rows, COUNTS)[0]

    assert torch.autograd.gradcheck(regrouped, rows)


def test_regroup_accepts_counts_that_are_a_view() -> None:
    """Counts come as a slice of what was exchanged."""
    wide = torch.stack([COUNTS, COUNTS + 1], dim=-1)
    rows = torch.randn(int(COUNTS.sum()), 3)
    got, expected = ops.regroup(rows, wide[..., 0]), ops.regroup(rows, COUNTS)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@property_test
@given(received())
def test_where_rows_go_is_the_same_by_the_host_and_by_a_device(counts: Tensor) -> None:
    number = int(counts.sum())
    by_host = experts._moved_on_host(counts, number)
    for one, other in zip(by_host, experts._moved_on_device(counts, number), strict=True):
        assert torch.equal(torch.from_numpy(one), other)


def test_where_rows_go_is_computed_on_the_host_without_atens_threads() -> None:
    """Processes with as many threads each made that 60 times slower."""

    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, _: Any, args: Any = (), given: Any = None) -> Any:
            assert op is torch.ops.aten.detach.default  # a view, of `Tensor.numpy`
            return op(*args)

    number = int(COUNTS.sum())
    with Nothing():
        experts._moved_on_host(COUNTS, number)


def test_rows_that_are_not_as_many_as_counted_are_an_error() -> None:
    with pytest.raises(RuntimeError, match=f"counts of {int(COUNTS.sum())} rows, 3 arrived"):
        ops.regroup(torch.randn(3, 2), COUNTS)


# -- grouped_mm ------------------------------------------------------------------------------------


@pytest.mark.parametrize("counts", [EXPERT_ROWS, [0, 0]], ids=["some rows", "no rows"])
@pytest.mark.parametrize("case", GROUPED)
def test_grouped_mm_passes_opcheck(case: str, counts: list[int]) -> None:
    opcheck(ops.grouped_mm, grouped_arguments(*GROUPED[case], counts))


@pytest.mark.parametrize("case", GROUPED)
def test_grouped_mm_grad_weight_passes_opcheck(case: str) -> None:
    rows, weight, offsets = grouped_arguments(*GROUPED[case], EXPERT_ROWS)
    grad = torch.randn(len(rows), weight.shape[2], dtype=rows.dtype)
    opcheck(ops.grouped_mm_grad_weight, (rows.detach(), grad, offsets))


@st.composite
def pieces_of_rows(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(rows, grads, offsets) of pieces; some rows behind the last offset are nobody's."""
    experts = draw(st.integers(1, 4))
    rows, grads, offsets = [], [], []
    for seed in range(draw(st.integers(1, 4))):
        counts = draw(st.lists(st.integers(0, 3), min_size=experts, max_size=experts))
        total = sum(counts) + draw(st.integers(0, 2))
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.randn(total, 3, dtype=torch.float64, generator=generator))
        grads.append(torch.randn(total, 2, dtype=torch.float64, generator=generator))
        offsets.append(offsets_of(counts))
    return rows, grads, offsets


@pytest.mark.parametrize(
    "op", [ops.grouped_mm_grad_weight_sum, experts._grad_weight_of_joined], ids=["host", "device"]
)
@given(pieces_of_rows())
@property_test
def test_grad_weight_sum_is_the_sum_of_each(
    op: Callable[..., Tensor], pieces: tuple[list[Tensor], list[Tensor], list[Tensor]]
) -> None:
    """Also the way it goes where the host does not know the offsets."""
    each = [ops.grouped_mm_grad_weight(*piece) for piece in zip(*pieces, strict=True)]
    torch.testing.assert_close(op(*pieces), torch.stack(each).sum(0))


@pytest.mark.parametrize("case", GROUPED)
def test_grad_weight_sum_passes_opcheck(case: str) -> None:
    rows, weight, offsets = grouped_arguments(*GROUPED[case], EXPERT_ROWS)
    grad = torch.randn(len(rows), weight.shape[2], dtype=rows.dtype)
    pieces = [rows.detach()] * 2, [grad] * 2, [offsets] * 2
    opcheck(ops.grouped_mm_grad_weight_sum, pieces)


def test_grad_weight_sum_of_whole_experts_is_that_of_all_rows_bit_for_bit() -> None:
    rows, weight, offsets = grouped_arguments(*GROUPED["float64"], EXPERT_ROWS)
    rows, grad = rows.detach(), torch.randn(7, weight.shape[2], dtype=rows.dtype)
    of_pieces = [offsets_of([3, 0, 0, 0]), offsets_of([0, 0, 4, 0])]
    found = ops.grouped_mm_grad_weight_sum(rows.split([3, 4]), grad.split([3, 4]), of_pieces)
    assert torch.equal(found, ops.grouped_mm_grad_weight(rows, grad, offsets))


def test_grouped_mm_has_the_gradient_of_its_formula() -> None:
    assert torch.autograd.gradcheck(
        ops.grouped_mm, grouped_arguments(torch.float64, 3, 2, EXPERT_ROWS)
    )


@pytest.mark.parametrize("transposed", [False, True], ids=["[L, D, N]", "[L, N, D] transposed"])
@pytest.mark.parametrize("case", GROUPED)
def test_grouped_mm_and_its_gradients_equal_a_loop_over_experts(
    case: str, transposed: bool
) -> None:
    rows, weight, offsets = grouped_arguments(*GROUPED[case], EXPERT_ROWS)
    if transposed:
        weight = weight.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    out = ops.grouped_mm(rows, weight, offsets)
    expected = each_by_its_expert(rows, weight, offsets)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad(out, (rows, weight), grad),
        torch.autograd.grad(expected, (rows, weight), grad),
    )


@property_test
@given(
    st.lists(st.sampled_from([0, 0, 1, 3]), min_size=1, max_size=4),
    st.integers(2, 9),
    st.integers(2, 9),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_grouped_mm_equals_a_loop_for_any_rows_and_features(
    counts: list[int], features_in: int, features_out: int, dtype: torch.dtype
) -> None:
    rows, weight, offsets = grouped_arguments(dtype, features_in, features_out, counts)
    out = ops.grouped_mm(rows, weight, offsets)
    expected = each_by_its_expert(rows, weight, offsets)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out.sum(), (rows, weight)),
        torch.autograd.grad(expected.sum(), (rows, weight)),
    )


@pytest.mark.parametrize(("features_in", "features_out"), [(1, 4), (4, 1), (1, 1)])
def test_grouped_mm_of_a_single_feature(features_in: int, features_out: int) -> None:
    arguments = grouped_arguments(torch.float32, features_in, features_out, EXPERT_ROWS)
    torch.testing.assert_close(ops.grouped_mm(*arguments), each_by_its_expert(*arguments))


@pytest.mark.parametrize("case", GROUPED)
def test_an_expert_without_rows_has_zero_gradient(case: str) -> None:
    rows, weight, offsets = grouped_arguments(*GROUPED[case], EXPERT_ROWS)
    ops.grouped_mm(rows, weight, offsets).sum().backward()
    assert weight.grad is not None
    busy = torch.tensor(EXPERT_ROWS) > 0
    assert torch.equal(weight.grad[~busy], torch.zeros_like(weight[~busy]))
    assert weight.grad[busy].ne(0).all()


@pytest.mark.parametrize("case", GROUPED)
def test_no_rows_at_all_give_no_rows_and_zero_gradients(case: str) -> None:
    rows, weight, offsets = grouped_arguments(*GROUPED[case], [0, 0])
    out = ops.grouped_mm(rows, weight, offsets)
    assert out.shape == (0, weight.shape[2]) and out.dtype == rows.dtype
    out.sum().backward()
    assert rows.grad is not None and rows.grad.shape == rows.shape
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


class CalledOps(TorchDispatchMode):
    """The names of moe_fx ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func.namespace == "moe_fx":
            self.names.append(func._opname)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("trained", "called"), [("rows", ["grouped_mm"]), ("weight", ["grouped_mm_grad_weight"])]
)
def test_grouped_mm_computes_only_the_gradient_that_is_asked_for(
    trained: str, called: list[str]
) -> None:
    rows, weight, offsets = grouped_arguments(torch.float32, 8, 4, EXPERT_ROWS)
    inputs = {"rows": rows, "weight": weight}
    for name, value in inputs.items():
        value.requires_grad_(name == trained)
    out = ops.grouped_mm(rows, weight, offsets)
    with CalledOps() as backward:
        torch.autograd.grad(out.sum(), inputs[trained])
    assert backward.names == called
