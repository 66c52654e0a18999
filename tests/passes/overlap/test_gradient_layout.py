"""Gradient layout: the same values, computed in the layout in which they are returned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from moe_fx.passes.overlap.gradient_layout import lay_out_gradients

ops = torch.ops.moe_fx


def transposed(gradient: Tensor) -> list[Tensor]:
    return [gradient.transpose(-1, 1)]


def permuted(gradient: Tensor) -> list[Tensor]:
    return [gradient.permute(0, 2, 1)]


def used_twice(gradient: Tensor) -> list[Tensor]:
    return [gradient.transpose(1, 2), gradient]


def otherwise(gradient: Tensor) -> list[Tensor]:
    return [gradient.permute(2, 0, 1)]


def moved(gradient: Tensor) -> list[Tensor]:
    return [gradient.transpose(0, 1)]


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize(
    ("returned", "contiguous"),
    [
        (transposed, True),
        (permuted, True),
        (used_twice, False),
        (otherwise, False),
        (moved, False),
    ],
)
def test_a_transposed_gradient_is_computed_transposed(
    returned: Callable[[Tensor], list[Tensor]], contiguous: bool, summed: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, grads = (torch.randn(5, size, generator=generator) for size in (3, 2))
    offsets = torch.tensor([2, 5], dtype=torch.int32)

    def backward(rows: Tensor, grads: Tensor, offsets: Tensor) -> list[Tensor]:
        if summed:
            gradient = ops.grouped_mm_grad_weight_sum([rows] * 2, [grads] * 2, [offsets] * 2)
        else:
            gradient = ops.grouped_mm_grad_weight(rows, grads, offsets)
        return returned(gradient)

    module = make_fx(backward, tracing_mode="fake")(rows, grads, offsets)
    expected = module(rows, grads, offsets)
    (output,) = module.graph.find_nodes(op="output")
    output.meta["original_output_strides"] = [each.meta["val"].stride() for each in output.args[0]]
    lay_out_gradients(module.graph)
    module.graph.lint()
    module.recompile()
    found = module(rows, grads, offsets)
    for each, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(each, wanted)
    assert found[0].is_contiguous() == contiguous
    strides = [each.stride() for each in found]
    assert strides == output.meta["original_output_strides"]
    assert strides == [each.meta["val"].stride() for each in output.args[0]]
