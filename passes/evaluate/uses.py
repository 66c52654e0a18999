"""What an input of a graph may hold, read off what the graph does with it.

Contract. ``uses_of(node)`` follows ``node`` forward through ops that only move or cast its entries,
and notes what bounds or explains them: the sizes they index, the numbers they are compared with,
whether their bits are taken apart, whether they are roots' or quotients' operands, whether they
multiply integers (the scale of a quantised weight). Nothing is proved by it: it only makes the
values that proofs run on typical (`typical.py`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.graph.nodes import ELEMENTWISE_COPIES, VIEWS, argument, is_grouped_matmul, shape, value

aten = torch.ops.aten

_LIMIT = 200
_MOVES = (
    *VIEWS,
    *ELEMENTWISE_COPIES,
    operator.getitem,
    aten.cat.default,
    aten.chunk.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.detach.default,
    aten.embedding.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.flatten.using_ints,
    aten.gather.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.permute.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.select.int,
    aten.slice.Tensor,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.stack.default,
    aten.t.default,
    aten.transpose.int,
    aten.type_as.default,
    aten.unbind.int,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    torch.ops._c10d_functional.all_gather_into_tensor.default,
    torch.ops._c10d_functional.wait_tensor.default,
    torch.ops.prims.convert_element_type.default,
)
"""Ops whose result holds entries of their first input, or of a list of inputs."""
_COMPARISONS = tuple(
    getattr(getattr(aten, name), overload)
    for name in ("eq", "ne", "lt", "le", "gt", "ge")
    for overload in ("Scalar", "Tensor")
)
_INDEX_AT: dict[Any, tuple[int | None, int]] = {
    aten.index_select.default: (1, 2),
    aten.gather.default: (1, 2),
    aten.embedding.default: (None, 1),
    aten.scatter.src: (1, 2),
    aten.scatter.value: (1, 2),
    aten.scatter_add.default: (1, 2),
    aten.index_add.default: (1, 2),
    aten.index_copy.default: (1, 2),
}
"""op -> positions of the dim (None: 0) and of the index into the op's first input."""
_BITS = (
    aten.bitwise_and.Scalar,
    aten.bitwise_and.Tensor,
    aten.bitwise_right_shift.Tensor,
    aten.bitwise_right_shift.Tensor_Scalar,
    aten.__rshift__.Scalar,
    aten.__and__.Scalar,
    aten.bitwise_left_shift.Tensor_Scalar,
)
_ROOTS = (aten.sqrt.default, aten.rsqrt.default, aten.log.default, aten.reciprocal.default)
_QUOTIENTS = (aten.div.Tensor, aten.div.Tensor_mode, aten.floor_divide.default)
_PRODUCTS = (aten.mul.Tensor, aten.div.Tensor)
_MATMUL_AT: dict[Any, tuple[int, ...]] = {
    aten.linear.default: (0, 1),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.matmul.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.einsum.default: (1,),
}
"""op -> positions of what it multiplies."""
_SHAPES_ONLY = (
    aten.sym_size.int,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.rand_like.default,
    aten.randn_like.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
"""Ops that read no entry of their input."""


@dataclass
class Uses:
    """below: entries index a dim of so many. compared: numbers that entries are compared with.
    multiplied: they take part in a matmul. bits: entries are taken apart. positive: roots are taken
    of them, or they divide. scales: the largest number that the integers they multiply can hold, if
    they do. viewed: the dtype of the floats that their bits are."""

    below: int | None = None
    compared: set[float] = field(default_factory=set)
    multiplied: bool = False
    bits: bool = False
    positive: bool = False
    scales: float | None = None
    viewed: torch.dtype | None = None

    def bound(self, size: Any) -> None:
        """Entries index a dim of ``size``; one that is not constant is taken for the least that
        has two entries."""
        number = size if isinstance(size, int) else 2
        if number > 0:
            self.below = number if self.below is None else min(self.below, number)


def reads_values(user: Node) -> bool:
    """Whether ``user`` may depend on its inputs' entries, not only on their sizes."""
    return user.target not in _SHAPES_ONLY


def uses_of(node: Node) -> Uses:
    uses = Uses()
    seen: set[Node] = set()
    stack: list[tuple[Node, float]] = [(node, 0)]  # a node, and what was added to the entries
    while stack and len(seen) < _LIMIT:
        current, added = stack.pop()
        for user in current.users:
            if user.op != "call_function":
                continue
            _note(uses, user, current, added)
            after = _moved(user, current, added)
            if after is not None and user not in seen:
                seen.add(user)
                stack.append((user, after))
    return uses


def _moved(user: Node, source: Node, added: float) -> float | None:
    """What has been added to entries of ``source`` in ``user``; None if it holds others."""
    if user.target in (aten.add.Tensor, aten.sub.Tensor, aten.add.Scalar, aten.sub.Scalar):
        left, right = user.args[:2]
        if left is source and isinstance(right, (int, float)) and not user.kwargs:
            minus = user.target in (aten.sub.Tensor, aten.sub.Scalar)
            return added - right if minus else added + right
        return None
    if user.target is aten.where.self:
        return added if source in user.args[1:] else None
    if user.target not in _MOVES:
        return None
    first = user.args[0]
    return (
        added if first is source or (isinstance(first, list | tuple) and source in first) else None
    )


def _note(uses: Uses, user: Node, source: Node, added: float) -> None:
    target, args = user.target, user.args
    if target in _INDEX_AT:
        dim_at, index_at = _INDEX_AT[target]
        dims = shape(args[0])
        if len(args) > index_at and args[index_at] is source and dims:
            dim: Any = 0 if dim_at is None else args[dim_at]
            uses.bound(dims[dim % len(dims)])
    elif target in (aten.index.Tensor, aten.index_put.default):
        dims, indices = shape(args[0]), args[1]
        for at, index in enumerate(indices):  # type: ignore[arg-type,union-attr]
            if index is source and value(source).dtype != torch.bool:
                uses.bound(dims[at])
    elif target is aten.one_hot.default:
        uses.bound(argument(user, 1, "num_classes", -1))
    elif target is aten.bincount.default:
        uses.bound(argument(user, 2, "minlength", 0))
    elif target is aten.histc.default:
        uses.bound(int(argument(user, 3, "max", 0)))
    elif target in _COMPARISONS:
        uses.compared |= {number - added for number in _compared_with(user, source)}
    elif target in _BITS:
        uses.bits |= args[0] is source
    elif target in _ROOTS or (target in _QUOTIENTS and args[1] is source):
        uses.positive = True
    if target is aten.view.dtype and value(user).dtype.is_floating_point:
        uses.viewed = value(user).dtype
    if is_grouped_matmul(user):
        uses.multiplied |= source in args[:2]
    elif target in _MATMUL_AT:
        given: list[Any] = [args[at] for at in _MATMUL_AT[target]]
        uses.multiplied |= any(
            source is n or (type(n) in (list, tuple) and source in n) for n in given
        )
    if target in _PRODUCTS:
        others = [n for n in user.all_input_nodes if n is not source]
        largest = [most for n in others if (most := _largest_integer(n)) is not None]
        if largest:
            uses.scales = max([*largest, uses.scales or 0.0])


def _compared_with(user: Node, source: Node) -> list[float]:
    """The numbers that entries of ``source`` are compared with: a constant, or as many as a range
    counts."""
    other = user.args[1] if user.args[0] is source else user.args[0]
    if isinstance(other, (int, float)):
        return [float(other)]
    while isinstance(other, Node) and other.target in (*_MOVES[:2], aten.unsqueeze.default):
        other = other.args[0]
    if isinstance(other, Node) and other.target is aten.arange.default:
        end = other.args[0]
        return [0.0, float(end if isinstance(end, int) else 2)]
    return []


def _largest_integer(node: Node) -> float | None:
    """The largest number that ``node`` can hold if it is made of the integers of a quantised
    weight, by casts, moves and arithmetic with constants."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        val = value(current)
        if current in seen or not isinstance(val, (Tensor, list, tuple)):
            continue
        seen.add(current)
        if isinstance(val, Tensor) and _is_integral(val.dtype):
            four = any(user.target in _BITS for user in current.users) or current.target in _BITS
            return 8.0 if four else float(min(torch.iinfo(val.dtype).max, 127))
        if current.op != "call_function" or len(seen) > _LIMIT:
            continue
        if current.target in _MATMUL_AT or is_grouped_matmul(current):
            stack += current.all_input_nodes
        elif current.target in (*_MOVES, aten.sub.Tensor, aten.add.Tensor, aten.sub.Scalar):
            stack += current.all_input_nodes[:1]
    return None


def _is_integral(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
