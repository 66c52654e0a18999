"""Roles: what a node of an MoE region *means*, whatever op spells it.

A role is relative to one selection (a top-k over experts) and speaks of pairs: pair ``i`` is slot
``i % K`` of token ``i // K``; ``T`` tokens, ``S = T * K`` pairs, ``E`` experts. The rules that give
roles are in `rules.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.compat import statically_known_true

aten = torch.ops.aten

Order = Literal["pair", "sorted"]
Stage = Literal["token", "expert", "post"]


class Refusal(Exception):
    """A rule's condition does not hold; ``reason`` is for people, ``progress`` orders refusals.
    ``unknown``: not that something is wrong, but that no rule says what it is. ``no_experts``: the
    selection is none of experts."""

    no_experts = False

    def __init__(self, reason: str, node: Node, progress: int = 0, unknown: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.node, self.progress, self.unknown = reason, node, progress, unknown


class NoExperts(Refusal):
    """No op on tokens reads a table of as many experts as are selected from."""

    no_experts = True

    def __init__(
        self,
        node: Node,
        reason: str = "no op on tokens reads a table of experts",
        progress: int = 0,
    ) -> None:
        super().__init__(reason, node, progress)


@dataclass(frozen=True)
class Role:
    """Base of all roles."""


@dataclass(frozen=True)
class PerToken(Role):
    """``[T, ...]`` computed from the selection: still the router's business. If integer and
    ``[T, K]`` it can serve as expert ids, if floating and ``[T, K]`` as routing weights."""


@dataclass(frozen=True)
class PairIds(Role):
    """``[S]`` expert id of each row; ``source`` is the ``[T, K]`` node it was flattened from."""

    order: Order
    source: Node


@dataclass(frozen=True)
class SortResult(Role):
    """(sorted ids, permutation) of a sort of `PairIds` in pair order."""

    source: Node


@dataclass(frozen=True)
class Permutation(Role):
    """``[S]`` permutation: sorted row -> pair, or its inverse: pair -> sorted row."""

    source: Node
    sort: Node
    inverse: bool = False


@dataclass(frozen=True)
class Scratch(Role):
    """``[S]`` that an inverse permutation is written into, or ``0 … S-1`` that is written."""


@dataclass(frozen=True)
class TokenIndex(Role):
    """``[S]`` token of each row."""

    order: Order


@dataclass(frozen=True)
class Counts(Role):
    """``[E]`` rows per expert, or its inclusive running sum (``offsets``)."""

    source: Node
    offsets: bool = False


@dataclass(frozen=True)
class PairWeights(Role):
    """``[S]`` or ``[S, 1]`` routing weight of each row."""

    order: Order
    source: Node


@dataclass(frozen=True)
class Rows(Role):
    """``[S, ...]``: row ``i`` depends only on its own token, its own expert and (stage "post") its
    own routing weight."""

    order: Order
    stage: Stage


@dataclass(frozen=True)
class RowTable(Role):
    """``[S, ...]``: each row's own copy of its expert's entry in a per-expert table."""

    order: Order


@dataclass(frozen=True)
class Grouped(Role):
    """``[T, K, ...]``: rows in pair order, viewed by token."""

    stage: Stage


@dataclass(frozen=True)
class Combined(Role):
    """``[T, ...]``: the K rows of each token summed: the region's output."""


@dataclass(frozen=True)
class Selection:
    """Which experts each token is to meet: the ops that select, and the sizes every rule speaks of.

    node: the last selecting op, for reports; selectors: all of them. lead: the dims that count
    tokens where the scores have more than one (``[B, S, E]``). columns: of the scores; more than
    ``num_experts`` if some select no expert. exact: ids are the selected indices, untouched.
    distinct: no token meets an expert twice. looked_up: ids come from a table or from outside.
    """

    node: Node
    num_tokens: Any
    num_experts: int
    top_k: int
    selectors: tuple[Node, ...] = ()
    lead: tuple[Any, ...] = ()
    columns: int = 0
    exact: bool = True
    distinct: bool = True
    looked_up: bool = False

    @property
    def num_pairs(self) -> Any:
        return self.num_tokens * self.top_k

    @property
    def sizes(self) -> tuple[Any, ...]:
        """All but the nodes: equal for equal layers."""
        return (
            *(self.num_tokens, self.num_experts, self.top_k, self.lead, self.columns),
            *(self.exact, self.distinct, self.looked_up),
        )


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
_DROPOUTS = (aten.dropout.default, aten.alpha_dropout.default)
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
    return node.target not in _DROPOUTS or _drops(node)


def random_above(node: Node) -> Node | None:
    """The random op that gives ``node`` its values, through ops that read nothing else."""
    while node.op == "call_function" and not is_random(node):
        sources = tensor_inputs(node)
        if len(sources) != 1:
            return None
        node = sources[0]
    return node if is_random(node) else None


class ByChance(Refusal):
    """Rows that are computed on another rank would meet other random values there."""

    def __init__(self, node: Node, progress: int = 6) -> None:
        chance = argument(node, 1, "p") if node.target in _DROPOUTS else None
        what = str(node.target) + (f" with p={chance}" if chance is not None else "")
        reason = (
            f"a random op ({what}) takes part between dispatch and combine: rows that another "
            "rank computes would meet other random values"
        )
        super().__init__(reason, node, progress)


def _drops(node: Node) -> bool:
    """Dropout in training, unless its probability is 0."""
    return argument(node, 2, "train") is not False and argument(node, 1, "p") != 0


def is_pointwise(node: Node) -> bool:
    if node.target in _DROPOUTS:
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
