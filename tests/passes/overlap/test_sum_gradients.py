"""Sum gradients: the same values, one product for each expert, whatever the sum looks like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from moe_fx.passes.overlap.sum_gradients import sum_gradients

ops = torch.ops.moe_fx

EXPERTS, PIECES = 2, 3
ROWS = [[2, 1], [0, 3], [0, 0]]
"""Of each piece and expert."""


def chained(gradients: list[Tensor], other: Tensor) -> list[Tensor]:
    return [gradients[0] + gradients[1] + gradients[2]]


def nested(gradients: list[Tensor], other: Tensor) -> list[Tensor]:
    return [gradients[2] + (gradients[0] + gradients[1])]


def beside_another(gradients: list[Tensor], other: Tensor) -> list[Tensor]:
    return [gradients[0] + other + gradients[1] + gradients[2]]


def transposed(gradients: list[Tensor], other: Tensor) -> list[Tensor]:
    first, *rest = (gradient.transpose(1, 2) for gradient in gradients)
    return [first + rest[0] + rest[1]]


def of_separate_matrices(gradients: list[Tensor], other: Tensor) -> list[Tensor]:
    by_piece = [gradient.unbind(0) for gradient in gradients]
    each = [[piece[expert].t() for piece in by_piece] for expert in range(EXPERTS)]
    # The pieces in another order for each expert.
    return [each[0][0] + each[0][1] + each[0][2], each[1][2] + each[1][1] + each[1][0]]


def summed_twice(gradients: list[Tensor], other: Tensor) -> list[Tensor]:
    total = gradients[0] + gradients[1]
    return [total, total + gradients[2]]


def with_a_factor(gradients: list[Tensor], other: Tensor) -> list[Tensor]:
    return [torch.add(gradients[0], gradients[1], alpha=2)]


def of_other_views(gradients: list[Tensor], other: Tensor) -> list[Tensor]:
    return [gradients[0][0] + gradients[1][1]]


def broadcast(gradients: list[Tensor], other: Tensor) -> list[Tensor]:
    return [gradients[0][0] + gradients[1]]


Total = Callable[[list[Tensor], Tensor], list[Tensor]]


def traced(total: Total) -> tuple[GraphModule, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.float64, generator=generator)

    inputs = [random(EXPERTS, 5, 4)]
    for counts in ROWS:
        inputs += [random(sum(counts), 5), random(sum(counts), 4)]
        inputs.append(torch.tensor(counts).cumsum(0).to(torch.int32))

    def backward(*values: Tensor) -> list[Tensor]:
        other, *pieces = values
        gradients = [
            ops.grouped_mm_grad_weight(*pieces[at : at + 3]) for at in range(0, 3 * PIECES, 3)
        ]
        return total(gradients, other)

    return make_fx(backward, tracing_mode="fake")(*inputs), inputs


@pytest.mark.parametrize(
    ("total", "each", "joined"),
    [
        (chained, 0, 1),
        (nested, 0, 1),
        (beside_another, 0, 1),
        (transposed, 0, 1),
        (of_separate_matrices, 0, 1),
        (summed_twice, 1, 1),
        (with_a_factor, 3, 0),
        (of_other_views, 3, 0),
        (broadcast, 3, 0),
    ],
)
def test_gradients_become_one_sum(total: Total, each: int, joined: int) -> None:
    module, inputs = traced(total)
    expected = module(*inputs)
    sum_gradients(module.graph)
    module.graph.lint()
    module.recompile()
    for found, wanted in zip(module(*inputs), expected, strict=True):
        torch.testing.assert_close(found, wanted)
    called = Counter(node.target for node in module.graph.nodes)
    assert called[ops.grouped_mm_grad_weight.default] == each
    assert called[ops.grouped_mm_grad_weight_sum.default] == joined
    for node in module.graph.nodes:
        if node.target is ops.grouped_mm_grad_weight_sum.default:
            assert node.meta["val"].shape == (EXPERTS, 5, 4)
