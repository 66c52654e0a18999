"""What one node of an FX graph is: its value, shape and arguments, and what kind of op it calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.compat import statically_known_true

aten = torch.ops.aten


def value(node: Any) -> Any:
    return node.meta.get("val") if isinstance(node, Node) else node


def shape(node: Any) -> tuple[Any, ...]:
    val = value(node)
    return tuple(val.shape) if isinstance(val, Tensor) else ()


def same(left: Any, right: Any) -> bool:
    """Equal for every value of the graph's symbols; never adds a guard."""
    return bool(statically_known_true(left == right))


def is_integer(node: Node) -> bool:
    val = value(node)
    return isinstance(val, Tensor) and not (
        val.dtype.is_floating_point or val.dtype.is_complex or val.dtype == torch.bool
    )


def tensor_inputs(node: Node) -> list[Node]:
    return [n for n in node.all_input_nodes if isinstance(value(n), (Tensor, tuple, list))]


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def dims_touched(node: Node) -> list[int] | None:
    """The dims along which the op mixes or renames entries of its first input; [] for none.

    None: unknown op. A result without 0 means rows (dim 0) stay apart and in place."""
    rule = _DIMS.get(node.target)
    if rule is None:
        return None
    rank = len(shape(node.args[0][0] if isinstance(node.args[0], (list, tuple)) else node.args[0]))
    if node.target is aten.unsqueeze.default:
        rank += 1
    return [dim % max(rank, 1) for dim in rule(node, rank)]


def _dim_list(position: int, name: str, default: Any) -> Callable[[Node, int], Iterable[int]]:
    def rule(node: Node, rank: int) -> Iterable[int]:
        dims = argument(node, position, name, default)
        if dims is None:
            return range(rank)
        return dims if isinstance(dims, (list, tuple)) else [dims]

    return rule


def _swapped(node: Node, rank: int) -> Iterable[int]:
    return [argument(node, 1, "dim0"), argument(node, 2, "dim1")]


def _permuted(node: Node, rank: int) -> Iterable[int]:
    order = [dim % rank for dim in argument(node, 1, "dims")]
    return [at for at, dim in enumerate(order) if at != dim]


def _normalized(position: int) -> Callable[[Node, int], Iterable[int]]:
    def rule(node: Node, rank: int) -> Iterable[int]:
        return range(rank - len(argument(node, position, "normalized_shape")), rank)

    return rule


_DIMS: dict[Any, Callable[[Node, int], Iterable[int]]] = {
    aten.split.Tensor: _dim_list(2, "dim", 0),
    aten.split_with_sizes.default: _dim_list(2, "dim", 0),
    aten.chunk.default: _dim_list(2, "dim", 0),
    aten.slice.Tensor: _dim_list(1, "dim", 0),
    aten.select.int: _dim_list(1, "dim", 0),
    aten.narrow.default: _dim_list(1, "dim", 0),
    aten.cat.default: _dim_list(1, "dim", 0),
    aten.flip.default: _dim_list(1, "dims", None),
    aten.softmax.int: _dim_list(1, "dim", None),
    aten._softmax.default: _dim_list(1, "dim", None),
    aten.sum.dim_IntList: _dim_list(1, "dim", None),
    aten.mean.dim: _dim_list(1, "dim", None),
    aten.amax.default: _dim_list(1, "dim", None),
    aten.cumsum.default: _dim_list(1, "dim", None),
    aten.glu.default: _dim_list(1, "dim", -1),
    aten.unsqueeze.default: _dim_list(1, "dim", 0),
    aten.squeeze.dim: _dim_list(1, "dim", 0),
    aten.transpose.int: _swapped,
    aten.permute.default: _permuted,
    aten.layer_norm.default: _normalized(1),
    aten.rms_norm.default: _normalized(1),
}

VIEWS: tuple[Any, ...] = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
ELEMENTWISE_COPIES = (aten._to_copy.default, aten.clone.default, aten.alias.default)
FRESH_BUFFERS: tuple[Any, ...] = (
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.zeros.default,
    aten.zeros_like.default,
    aten.full.default,
    aten.new_empty.default,
    aten.new_zeros.default,
)
DROPOUTS = (aten.dropout.default, aten.alpha_dropout.default)
GROUPED_MATMULS = tuple(
    op
    for op in (
        getattr(aten._grouped_mm, "default", None),
        torch.ops.moe_fx.grouped_mm.default,
    )
    if op is not None
)


def is_grouped_matmul(node: Node) -> bool:
    return node.target in GROUPED_MATMULS or str(node.target) == (
        "transformers.grouped_mm_fallback.default"
    )


def is_random(node: Node) -> bool:
    """Whether another run of ``node`` gives other values: dropout, noise."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    return node.target not in DROPOUTS or _drops(node)


def random_above(node: Node) -> Node | None:
    """The random op that gives ``node`` its values, through ops that read nothing else."""
    while node.op == "call_function" and not is_random(node):
        sources = tensor_inputs(node)
        if len(sources) != 1:
            return None
        node = sources[0]
    return node if is_random(node) else None


def _drops(node: Node) -> bool:
    """Dropout in training, unless its probability is 0."""
    return argument(node, 2, "train") is not False and argument(node, 1, "p") != 0


def is_pointwise(node: Node) -> bool:
    if node.target in DROPOUTS:
        return not _drops(node)
    tags = getattr(node.target, "tags", ())
    return node.target in (*ELEMENTWISE_COPIES, aten.fake_quantize_per_tensor_affine.default) or (
        torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags
    )


def is_unary_rowwise(node: Node) -> bool:
    """One tensor in, rows (dim 0) kept apart and in place."""
    if len(tensor_inputs(node)) != 1 or not shape(node):
        return False
    if node.target in ELEMENTWISE_COPIES or is_pointwise(node):
        return True
    if node.target in VIEWS:
        before = shape(node.args[0])
        return bool(before) and same(before[0], shape(node)[0])
    touched = dims_touched(node)
    return touched is not None and 0 not in touched
