"""Which inputs of an op are cut with its result, if that is cut to some experts' blocks.

Contract. A tensor is *blocked* by ``E`` experts if its first dim is ``E * m``: expert ``e`` has the
entries from ``e * m`` to ``(e + 1) * m``. ``cut_inputs(node, E)`` says of which inputs an expert's
block of ``node`` needs only that expert's block; the op needs its other inputs whole. None: a block
of the result needs more than that, or nothing is known about the op. ``cut_call`` gives the
call that makes some experts' blocks of the result.

To teach it an op, add a rule to ``_RULES``; an op along some dims, add it to ``_DIMS_OF``.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.graph.contraction import parsed
from moe_fx.graph.nodes import (
    VIEWS,
    argument,
    dims_touched,
    is_pointwise,
    same,
    shape,
    tensor_inputs,
    value,
)

aten = torch.ops.aten

Cut = tuple[Node, ...] | None


def is_blocked(node: Node, experts: int) -> bool:
    """Whether the first dim of ``node`` (of each of its results) counts blocks of experts."""
    val = value(node)
    tensors = val if isinstance(val, (tuple, list)) else [val]
    return bool(tensors) and all(
        isinstance(t, Tensor)
        and t.dim() > 0
        and isinstance(t.shape[0], int)
        and t.shape[0] > 0
        and t.shape[0] % experts == 0
        for t in tensors
    )


def cut_inputs(node: Node, experts: int) -> Cut:
    if node.op != "call_function" or not is_blocked(node, experts):
        return None
    for targets, rule in _RULES:
        if node.target in targets:
            return rule(node, experts)
    if is_pointwise(node) or node.target in _LIKE_POINTWISE:
        return _pointwise(node, experts)
    if node.target in _DIMS_OF or dims_touched(node) is not None:
        return _along_dims(node, experts)
    return None


def cut_call(node: Node, experts: int, kept: int) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """(op, arguments) that make ``kept`` of the experts' blocks of ``node``, if its cut inputs
    stand for theirs."""
    lead = shape(node)[0] // experts * kept if isinstance(value(node), Tensor) else 0
    sizes = [lead, *shape(node)[1:]]
    if node.target in _RESHAPES:
        return aten.reshape.default, (node.args[0], sizes), {}
    if node.target in (aten.expand.default, aten.expand_as.default):
        return aten.expand.default, (node.args[0], sizes), {}
    return node.target, node.args, dict(node.kwargs)


# -- rules -----------------------------------------------------------------------------------------


def _pointwise(node: Node, experts: int) -> Cut:
    """Inputs are aligned at the right: one with fewer dims, or one entry along the first, is read
    by every expert."""
    return _aligned(tensor_inputs(node), node)


def _aligned(inputs: Sequence[Node], node: Node) -> Cut:
    rank, lead = len(shape(node)), shape(node)[0]
    cut: dict[Node, None] = {}
    for source in inputs:
        dims = shape(source)
        if len(dims) == rank and same(dims[0], lead):
            cut[source] = None
        elif len(dims) > rank or (len(dims) == rank and not same(dims[0], 1)):
            return None
    return tuple(cut)


def _first(node: Node, experts: int) -> Cut:
    """The first input is blocked as the result is."""
    source = node.args[0]
    assert isinstance(source, Node)
    return (source,) if is_blocked(source, experts) else None


def _reshape(node: Node, experts: int) -> Cut:
    """Entries keep their order, so that experts' blocks stay in one piece each."""
    whole = all(isinstance(size, int) for size in shape(node))
    return _first(node, experts) if whole else None


def _expand(node: Node, experts: int) -> Cut:
    source = node.args[0]
    assert isinstance(source, Node)
    if not all(isinstance(size, int) for size in shape(node)):
        return None
    return _aligned(tensor_inputs(node), node)


def _repeat(node: Node, experts: int) -> Cut:
    repeats: Any = node.args[1]
    untouched = len(repeats) == len(shape(node.args[0])) and repeats[0] == 1
    return _first(node, experts) if untouched else None


def _repeat_interleave(node: Node, experts: int) -> Cut:
    fixed = argument(node, 2, "dim") is not None and not node.kwargs.get("output_size")
    return _first(node, experts) if fixed else None


def _item(node: Node, experts: int) -> Cut:
    return _first(node, experts)


def _along_dims(node: Node, experts: int) -> Cut:
    """Every dim but the first is free; a list of tensors is cut one by one, and what else an op
    along other dims reads (a scale per feature) is read by every expert."""
    touched = _touched(node)
    if touched is None or 0 in touched:
        return None
    first = node.args[0]
    many = first if isinstance(first, (list, tuple)) else [first]
    sources = [n for n in many if isinstance(n, Node)]
    lead = _lead(node)
    return tuple(sources) if all(same(_lead(n), lead) for n in sources) else None


def _touched(node: Node) -> list[int] | None:
    if node.target not in _DIMS_OF:
        return dims_touched(node)
    position, name, default = _DIMS_OF[node.target]
    dims = argument(node, position, name, default)
    first = node.args[0]
    rank = len(shape(first[0] if isinstance(first, (list, tuple)) else first))
    if node.target is aten.stack.default:
        rank += 1
    if dims is None or dims == []:
        return list(range(rank))
    return [dim % rank for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]


def _slice(node: Node, experts: int) -> Cut:
    """Of the first dim, all of it only."""
    size = shape(node.args[0])[0]
    dim = argument(node, 1, "dim", 0) % len(shape(node.args[0]))
    start, end = argument(node, 2, "start"), argument(node, 3, "end")
    everything = start in (None, 0) and (end is None or end >= size)
    return _first(node, experts) if dim or (everything and same(_lead(node), size)) else None


def _slice_scatter(node: Node, experts: int) -> Cut:
    size = shape(node)[0]
    dim = argument(node, 2, "dim", 0) % len(shape(node))
    start, end = argument(node, 3, "start"), argument(node, 4, "end")
    everything = start in (None, 0) and (end is None or end >= size)
    inputs: Any = node.args[:2]
    return _aligned(inputs, node) if dim or everything else None


def _select_scatter(node: Node, experts: int) -> Cut:
    dim = argument(node, 2, "dim", 0) % len(shape(node))
    inputs: Any = node.args[:2]
    return tuple(inputs) if dim and same(shape(inputs[1])[0], shape(node)[0]) else None


def _index(node: Node, experts: int) -> Cut:
    """One index, along another dim than the first."""
    indices: Any = node.args[1]
    given = [at for at, index in enumerate(indices) if index is not None]
    return _first(node, experts) if len(given) == 1 and given[0] > 0 else None


def _index_select(node: Node, experts: int) -> Cut:
    dim = argument(node, 1, "dim") % len(shape(node))
    return _first(node, experts) if dim else None


def _gather(node: Node, experts: int) -> Cut:
    source, dim, index = node.args[:3]
    inputs: Any = (source, index)
    if dim % len(shape(node)) == 0:  # type: ignore[operator]
        return None
    return inputs if same(shape(source)[0], shape(index)[0]) else None


def _matrices(node: Node, experts: int) -> Cut:
    """Blocks are along a batch dim, or the rows of the left matrix."""
    left, right = node.args[:2]
    assert isinstance(left, Node) and isinstance(right, Node)
    if len(shape(right)) <= 2:
        return (left,) if len(shape(left)) > 1 else None
    return _aligned([left, right], node)


def _linear(node: Node, experts: int) -> Cut:
    source = node.args[0]
    assert isinstance(source, Node)
    return (source,) if len(shape(source)) > 1 else None


def _batched(node: Node, experts: int) -> Cut:
    return _aligned(tensor_inputs(node), node)


def _added_matrices(node: Node, experts: int) -> Cut:
    bias, left = node.args[:2]
    assert isinstance(bias, Node) and isinstance(left, Node)
    added = _aligned([bias], node)
    return None if added is None else (*added, left)


def _einsum(node: Node, experts: int) -> Cut:
    equation, operands = node.args[:2]
    read = parsed(str(equation))
    assert isinstance(operands, (list, tuple))
    if read is None or not read[1]:
        return None
    letter = read[1][0]
    cut: dict[Node, None] = {}
    for letters, operand in zip(read[0], operands, strict=True):
        if letter in letters:
            if letters[0] != letter:
                return None
            cut[operand] = None  # type: ignore[index]
    return tuple(cut)


def _weight_norm(node: Node, experts: int) -> Cut:
    inputs: Any = node.args[:2]
    return tuple(inputs) if argument(node, 2, "dim", 0) == 0 else None


def _lead(node: Node) -> Any:
    val = value(node)
    return shape(node)[0] if isinstance(val, Tensor) else val[0].shape[0]


_RESHAPES = (
    *VIEWS,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
)
_LIKE_POINTWISE = (
    aten.floor_divide.default,
    aten.__and__.Scalar,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.empty_like.default,
    aten.full_like.default,
    aten.detach.default,
    aten.contiguous.default,
)
_DIMS_OF: dict[Any, tuple[int, str, Any]] = {
    aten.stack.default: (1, "dim", 0),
    aten.unbind.int: (1, "dim", 0),
    aten.linalg_vector_norm.default: (2, "dim", None),
    aten.norm.ScalarOpt_dim: (2, "dim", None),
    aten.amin.default: (1, "dim", None),
    aten.aminmax.default: (1, "dim", None),
    aten.max.dim: (1, "dim", None),
    aten.min.dim: (1, "dim", None),
    aten.argmax.default: (1, "dim", None),
    aten.argmin.default: (1, "dim", None),
    aten.prod.dim_int: (1, "dim", None),
    aten.var.correction: (1, "dim", None),
    aten.std.correction: (1, "dim", None),
    aten.var.dim: (1, "dim", None),
    aten.std.dim: (1, "dim", None),
    aten.logsumexp.default: (1, "dim", None),
    aten.log_softmax.int: (1, "dim", None),
    aten.cumprod.default: (1, "dim", None),
    aten.roll.default: (2, "dims", None),
    aten.sort.default: (1, "dim", -1),
    aten.topk.default: (2, "dim", -1),
    aten.tril.default: (9, "", [-2, -1]),
    aten.triu.default: (9, "", [-2, -1]),
    getattr(aten.view, "dtype"): (9, "", -1),  # noqa: B009
}
"""op -> position, name and default of the argument that names its dims."""

_RULES: tuple[tuple[Sequence[Any], Callable[[Node, int], Cut]], ...] = (
    (_RESHAPES, _reshape),
    ((aten.expand.default, aten.expand_as.default), _expand),
    ((aten.repeat.default,), _repeat),
    ((aten.repeat_interleave.self_int,), _repeat_interleave),
    ((operator.getitem,), _item),
    ((aten.slice.Tensor,), _slice),
    ((aten.slice_scatter.default,), _slice_scatter),
    ((aten.select_scatter.default,), _select_scatter),
    ((aten.index.Tensor,), _index),
    ((aten.index_select.default,), _index_select),
    ((aten.gather.default,), _gather),
    ((aten.mm.default, aten.matmul.default), _matrices),
    ((aten.linear.default,), _linear),
    ((aten.bmm.default, aten.baddbmm.default), _batched),
    ((aten.addmm.default,), _added_matrices),
    ((aten.einsum.default,), _einsum),
    ((aten._weight_norm.default,), _weight_norm),
)
