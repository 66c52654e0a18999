"""Matmuls of any spelling as one thing: operands with a letter for each dim, and the result's.

``linear``, ``mm``, ``matmul``, ``bmm``, ``addmm``, ``baddbmm`` and an ``einsum`` of two operands
all read as ``operands[0], operands[1] -> out`` with letters, as einsum has them; what else they add
is the ``bias``. Letters that the result lacks are summed.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from moe_fx.graph.nodes import shape

aten = torch.ops.aten


@dataclass(frozen=True)
class Contraction:
    """``operands``: the two nodes; ``letters``: of each, one a dim; ``out``: of the result.
    ``bias`` is added, right-aligned with the result (None: nothing is)."""

    operands: tuple[Node, Node]
    letters: tuple[str, str]
    out: str
    bias: Node | None = None


def contraction(node: Node) -> Contraction | None:
    """What ``node`` multiplies, or None if it is no matmul of two tensors (or one that scales)."""
    args: Any = node.args
    match node.target:
        case aten.linear.default:
            rows, weight, *bias = args
            lead = _letters(len(shape(rows)) - 1)
            if len(shape(weight)) != 2:
                return None
            return Contraction(
                (rows, weight), (lead + "y", "zy"), lead + "z", bias[0] if bias else None
            )
        case aten.mm.default | aten.matmul.default:
            return _matmul(args[0], args[1])
        case aten.bmm.default:
            return Contraction((args[0], args[1]), ("xay", "xyb"), "xab")
        case aten.addmm.default if not node.kwargs:
            return Contraction((args[1], args[2]), ("ay", "yb"), "ab", args[0])
        case aten.baddbmm.default if not node.kwargs:
            return Contraction((args[1], args[2]), ("xay", "xyb"), "xab", args[0])
        case aten.einsum.default:
            return _einsum(args[0], args[1])
    return None


def _letters(count: int) -> str:
    return string.ascii_lowercase[:count]


def _matmul(left: Node, right: Node) -> Contraction | None:
    a, b = len(shape(left)), len(shape(right))
    if min(a, b) < 2:
        return None
    batch = _letters(max(a, b) - 2)
    one, other = batch[len(batch) - (a - 2) :], batch[len(batch) - (b - 2) :]
    return Contraction((left, right), (one + "xy", other + "yz"), batch + "xz")


def _einsum(equation: str, operands: Any) -> Contraction | None:
    read = parsed(equation)
    if read is None or len(operands) != 2:
        return None
    (left, right), out = read
    return Contraction(tuple(operands), (left, right), out)


def parsed(equation: str) -> tuple[list[str], str] | None:
    """Letters of the operands and of the result; None for an equation with ``...`` or a repeated
    letter, or whose result is not spelled out."""
    given, arrow, out = equation.replace(" ", "").partition("->")
    operands = given.split(",")
    if not arrow or "." in equation or any(len(set(o)) != len(o) for o in [*operands, out]):
        return None
    return operands, out
