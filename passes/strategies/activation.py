"""What stands between the experts' matmuls, read off by value.

Contract. ``read_activation(middle)`` gives the `moe_fx.plan.Fused` whose values are those of the
middle's nodes on random columns, or raises `Unfused` with what stands in the way. It does not
matter how the nodes spell it: they are run in float64, on columns that are zero, small, usual, and
beyond every constant that occurs among the nodes, so that limits show.

Pseudo-code::

    columns = random;  expected = the nodes' values
    for each layout that the sizes allow, act, limit, alpha, shift, the numbers from the nodes:
        some of the columns give the same values -> all must; the first such is the activation
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.graph.nodes import is_pointwise, is_random
from moe_fx.ops.fused import ACTS, Body, split_columns
from moe_fx.passes.evaluate.on_host import call_on_host, exactly
from moe_fx.plan import Fused

aten = torch.ops.aten

_TOLERANCE = 1e-6
_SPREADS = (0.05, 1.0, 3.0, 10.0)
_ROWS_EACH = 3
_SOME = 16
"""Columns of a first look."""
_MOST_NUMBERS = 8
_KNOWN = (
    aten.silu.default,
    aten.gelu.default,
    aten.relu.default,
    aten.sigmoid.default,
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.clamp.default,
    aten.pow.Tensor_Scalar,
    aten.square.default,
    aten._to_copy.default,
)
"""Ops that activations of the kernels are spelled with: no use to name them as what is in the
way."""


class Unfused(Exception):
    """Why a layer's experts are not fused, in a sentence for people."""


@dataclass(frozen=True)
class Middle:
    """nodes: in graph order, from the matmuls' results ``products`` (one, or two of as many columns
    each) to ``result``, what the last matmul multiplies. given: what else they read: numbers of
    rows (None) and tensors of one number. columns: of each product; inner: of the result."""

    nodes: tuple[Node, ...]
    products: tuple[Node, ...]
    result: Node
    given: dict[Node, Tensor | None]
    columns: int
    inner: int


def read_activation(middle: Middle) -> Fused:
    for node in middle.nodes:
        if is_random(node):
            raise Unfused(f"{name_of(node)} between the experts' matmuls is random")
    layouts = list(_layouts(middle))
    numbers = _numbers(middle)
    generator = torch.Generator().manual_seed(0)
    spreads = (*_SPREADS, *(2 * number for number in numbers))
    rows = 1 + _ROWS_EACH * len(spreads)
    scale = torch.tensor([0.0, *(s for s in spreads for _ in range(_ROWS_EACH))]).double()
    columns = [
        torch.randn(rows, middle.columns, generator=generator, dtype=torch.float64)
        * scale.unsqueeze(1)
        for _ in middle.products
    ]
    expected = _run(middle, columns)
    if expected.shape != (rows, middle.inner):
        raise Unfused(f"{_culprit(middle)} between the experts' matmuls mixes rows")
    for layout, up_first in layouts:
        found = _fit(layout, up_first, torch.cat(columns, -1), expected, numbers)
        if found is not None:
            return found
    raise Unfused(
        f"{_culprit(middle)} between the experts' matmuls is no activation that the kernels know"
    )


def _layouts(middle: Middle) -> Iterator[tuple[str, bool]]:
    """(layout of the op, whether up comes first of two products)."""
    if len(middle.products) == 2:
        if middle.columns != middle.inner:
            raise Unfused("the experts' two first matmuls are not as wide as the last takes")
        yield from (("separate", False), ("separate", True))
    elif middle.columns == 2 * middle.inner:
        yield from ((layout, False) for layout in ("halves", "halves_up_first", "interleaved"))
    elif middle.columns == middle.inner:
        yield "single", False
    else:
        raise Unfused(
            f"the experts' first matmul gives {middle.columns} columns, the last takes "
            f"{middle.inner}"
        )


def _fit(
    layout: str, up_first: bool, columns: Tensor, expected: Tensor, numbers: list[float]
) -> Fused | None:
    spelled = {"separate": "halves_up_first" if up_first else "halves"}.get(layout, layout)
    gate, up = split_columns(columns, spelled)
    some = [part[:, :_SOME] for part in (gate, up) if part is not None]
    few, few_expected = torch.cat(some, -1), expected[:, :_SOME]
    for act, limit, alpha, shift in product(
        ACTS, (None, *numbers), (1.0, *numbers), (0.0, *numbers)
    ):
        if (alpha != 1.0 and act != "silu") or (shift and up is None):
            continue  # the op does not read it
        few_body = Body("single" if up is None else "halves", act, alpha, limit, shift)
        if _close(few_body(few), few_expected) and _close(
            Body(spelled, act, alpha, limit, shift)(columns), expected
        ):
            return Fused(layout, act, alpha, limit, shift, up_first)
    return None


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)


def _run(middle: Middle, columns: list[Tensor]) -> Tensor:
    rows = len(columns[0])
    values: dict[Node, Any] = {n: rows if v is None else v for n, v in middle.given.items()}
    values |= dict(zip(middle.products, columns, strict=True))
    try:
        with exactly(True):
            for node in middle.nodes:
                values[node] = call_on_host(node, values, exact=True)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        reason = f"{name_of(node)} between the experts' matmuls cannot be run alone"
        raise Unfused(f"{reason}: {type(error).__name__}: {error}") from None
    result: Tensor = values[middle.result]
    return result.double().reshape(rows, -1) if result.numel() % rows == 0 else result


def _numbers(middle: Middle) -> list[float]:
    """The positive constants that pointwise ops among the nodes compute with, and the absolute
    values of the negative ones."""
    found: dict[float, None] = {}
    for node in middle.nodes:
        if is_pointwise(node):
            given = [*node.args, *node.kwargs.values()]
            numbers = [abs(float(a)) for a in given if isinstance(a, int | float)]
            found |= dict.fromkeys(numbers)
    found |= dict.fromkeys(abs(float(v)) for v in middle.given.values() if v is not None)
    return [n for n in found if n > 0 and n < float("inf")][:_MOST_NUMBERS]


def _culprit(middle: Middle) -> str:
    """The first op that no activation of the kernels is spelled with; all, if there is none."""
    pointwise = [node for node in middle.nodes if is_pointwise(node)]
    strange = [node for node in pointwise if node.target not in _KNOWN]
    if strange:
        return name_of(strange[0])
    return ", ".join(dict.fromkeys(name_of(node) for node in pointwise)) or "nothing"


def name_of(node: Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target).removesuffix(".default")
    return getattr(node.target, "__name__", str(node.target))
