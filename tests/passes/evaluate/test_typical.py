"""What an input is given instead of the value that it had: another one, that it can hold."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx import Graph, Node

from moe_fx.passes.evaluate.typical import drawn

aten = torch.ops.aten
INTEGERS = (torch.uint8, torch.int8, torch.int32, torch.int64)


@st.composite
def numbers(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(INTEGERS))
    info = torch.iinfo(dtype)
    return torch.tensor(draw(st.integers(info.min, info.max)), dtype=dtype)


def placeholder(real: torch.Tensor) -> Node:
    node = Graph().placeholder("n")
    node.meta |= {"val": real, "real": real}
    return node


@given(real=numbers(), again=st.integers(1, 8), divides=st.booleans())
def test_another_number_is_one_of_its_dtype_and_never_0_where_it_divides(
    real: torch.Tensor, again: int, divides: bool
) -> None:
    node = placeholder(real)
    if divides:
        tensor = node.graph.placeholder("x")
        node.graph.call_function(aten.div.Tensor, (tensor, node))
    other = drawn(node, [], 0, again=again)
    assert other.dtype == real.dtype and other.shape == ()
    assert int(other) != int(real)
    assert int(other) or not divides


def test_a_number_is_less_and_more_and_0_in_turn() -> None:
    node = placeholder(torch.tensor(7))
    assert [int(drawn(node, [], 0, again=again)) for again in (1, 2, 3, 4)] == [3, 8, 0, 9]
