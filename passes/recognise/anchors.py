"""Anchors: where MoE layers may start, that is, which ops select experts.

Contract. In: a normalised graph. Out: one `Anchor` per router, in graph order, which `selection.py`
turns into the `Selection` the rules speak of.

Pseudo-code, one pass over the graph::

    follow the indices of every selecting op (SELECTORS) through ops with integer results
    where they order, count, mark or look up something (a dispatch): the ops they came from form
        one anchor, and what is looked up or counted says how many experts there are
    a top-k is an anchor in any case, unless it only leads to another one (group selection)

Not a candidate, so never in a report: ``max``, ``argmax``, descending ``sort`` or an integer lookup
whose indices dispatch nothing. If all they do is mark positions (one-hot, ``ids == 3``), the anchor
is not ``certain``: a region is looked for, a refusal is reported only if rows met a table of as
many experts as are selected from. A top-k always is.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moe_fx.graph.nodes import (
    ELEMENTWISE_COPIES,
    VIEWS,
    argument,
    is_grouped_matmul,
    is_integer,
    same,
    shape,
    tensor_inputs,
    value,
)
from moe_fx.graph.parameters import is_noted
from moe_fx.graph.selectors import LOOKUPS, SORTS, is_lookup_of_ids, is_selector, keep_dim

aten = torch.ops.aten

_COUNTS = {aten.histc.default: "bins", aten.bincount.default: "minlength"}
_MARKS = (
    aten.one_hot.default,
    aten.scatter.src,
    aten.scatter.value,
    aten.scatter_add.default,
    aten.eq.Tensor,
)
EXACT = (
    *VIEWS,
    *ELEMENTWISE_COPIES,
    operator.getitem,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.squeeze.dim,
    aten.squeeze.default,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.cat.default,
    aten.concat.default,
    aten.detach.default,
)
"""Ops whose result holds nothing but entries of their inputs."""
_LOGIT_OPS = (
    aten.linear.default,
    aten.mm.default,
    aten.addmm.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.embedding.default,
    aten.scaled_dot_product_attention.default,
)
"""Where the search for selections that feed a selection stops."""


@dataclass(frozen=True)
class Anchor:
    """One router's selecting ops, and what their indices were seen to do.

    node: the last of ``selectors``, for reports. ids: where the indices dispatch first (None: they
    do not). experts: how many experts the dispatch speaks of (None: it does not say). exact: the
    dispatched ids are the selected indices, untouched. certain: a refusal is worth reporting.
    """

    node: Node
    selectors: tuple[Node, ...]
    ids: Node | None = None
    experts: int | None = None
    exact: bool = True
    certain: bool = True


def find_anchors(graph: Graph) -> list[Anchor]:
    """Every router of the graph that may have experts, in graph order.

    Selections of one expert that drop the dim they select over are respelled (``keepdim=True``
    and a squeeze), so that ids and weights have a matrix ``[T, 1]``.
    """
    trace = _Trace()
    for node in graph.nodes:
        trace.visit(node)
    anchors = trace.anchors()
    for anchor in anchors:
        for selector in anchor.selectors:
            keep_dim(selector)
    return anchors


# -- following the indices -------------------------------------------------------------------------


@dataclass
class _Dispatch:
    """What one set of selecting ops was seen to do, until no more is."""

    selectors: set[Node]
    ids: Node | None = None
    experts: int | None = None
    counted: bool = False
    exact: bool = True
    certain: bool = False
    looks_up_matrices: bool = False
    compared: set[int] = field(default_factory=set)


class _Trace:
    """reach: index-valued node -> the selecting ops its entries come from. exact: of those, the
    ones that hold selected indices untouched."""

    def __init__(self) -> None:
        self.order: dict[Node, int] = {}
        self.reach: dict[Node, frozenset[Node]] = {}
        self.exact: set[Node] = set()
        self.matrix: dict[Node, Node] = {}
        self.sorts: dict[Node, Node] = {}
        self.dispatches: dict[Node, _Dispatch] = {}
        self.given: dict[Node, None] = {}
        self.multiplies_by_group = False

    def visit(self, node: Node) -> None:
        self.multiplies_by_group |= is_grouped_matmul(node)
        if node.op == "placeholder" and is_integer(node) and shape(node) and not is_noted(node):
            self.given[node] = None
            self.order[node] = len(self.order)
            self._hold_indices(node, frozenset([node]), exact=True)
        if node.op != "call_function":
            return
        if is_selector(node) and not self._maps_ids(node):
            self.order[node] = len(self.order)
            if isinstance(value(node), Tensor):
                self._hold_indices(node, frozenset([node]), exact=True)
        elif node.target is operator.getitem:
            self._tuple_item(node)
        elif not self._dispatch(node):
            self._follow(node)

    def _maps_ids(self, node: Node) -> bool:
        """Whether ``node`` looks up other ids for selected ones: one selection, not two."""
        if node.target not in LOOKUPS or not is_lookup_of_ids(node):
            return False
        index = node.args[LOOKUPS[node.target][1]]
        indices = index if isinstance(index, (list, tuple)) else [index]
        found = [self.reach[i] for i in indices if isinstance(i, Node) and i in self.reach]
        return any(not reached <= self.given.keys() for reached in found)

    def _hold_indices(self, node: Node, selectors: frozenset[Node], exact: bool) -> None:
        self.reach[node] = selectors
        if exact:
            self.exact.add(node)
        source = node.args[0] if node.args else None
        above = self.matrix.get(source) if isinstance(source, Node) else None
        self.matrix[node] = node if len(shape(node)) > 1 or above is None else above

    def _tuple_item(self, node: Node) -> None:
        source, at = node.args
        assert isinstance(source, Node)
        if source in self.order and at == 1:
            self._hold_indices(node, frozenset([source]), exact=True)
        elif source in self.sorts and at == 0:
            ids = self.sorts[source]
            self._hold_indices(node, self.reach[ids], ids in self.exact)
            self.matrix[node] = self.matrix[ids]

    def _follow(self, node: Node) -> None:
        sources = [n for n in node.all_input_nodes if n in self.reach]
        copied = node.target in ELEMENTWISE_COPIES and value(node).dtype != torch.bool
        if not sources or not shape(node) or not (is_integer(node) or copied):
            return
        exact = node.target in EXACT and all(n in self.exact for n in tensor_inputs(node))
        reached = frozenset().union(*(self.reach[n] for n in sources))
        self._hold_indices(node, reached.difference(self.given) or reached, exact)

    def _dispatch(self, node: Node) -> bool:
        """Whether ``node`` orders, counts, marks or looks up something by selected indices."""
        if node.target in SORTS and node.args[0] in self.reach:
            ids = node.args[0]
            assert isinstance(ids, Node)
            self.sorts[node] = ids
            self._note(ids, certain=True)
        elif node.target in _COUNTS and node.args[0] in self.reach:
            bins = argument(node, 1 if "histc" in str(node.target) else 2, _COUNTS[node.target])
            self._note(node.args[0], experts=bins or None, counted=True, certain=True)
        elif node.target in LOOKUPS:
            return self._look_up(node)
        elif node.target is aten.eq.Scalar:
            self._compare(node.args[0], node.args[1])
        elif node.target in _MARKS:
            marked = [n for n in node.all_input_nodes if n in self.reach]
            for ids in marked:
                self._note(ids, experts=_marked_experts(node))
            return bool(marked)
        else:
            return False
        return True

    def _look_up(self, node: Node) -> bool:
        table_at, index_at = LOOKUPS[node.target]
        table, index = node.args[table_at], node.args[index_at]
        listed = index if isinstance(index, (list, tuple)) else [index]
        indices = [i for i in listed if isinstance(i, Node)]
        if len(indices) != 1 or indices[0] not in self.reach:
            return False
        dims = shape(table)
        if len(dims) < 2 or not value(table).dtype.is_floating_point:
            return False
        experts = dims[0] if isinstance(dims[0], int) else None
        strong = len(dims) > 2 or any(n.target is aten.topk.default for n in self.reach[indices[0]])
        if strong:
            noted = self._note(indices[0], experts=experts, certain=True)
            noted.looks_up_matrices |= len(dims) > 2
        return True

    def _compare(self, ids: Any, constant: Any) -> None:
        """``ids == 0, ids == 1, …``: by how many constants the ids are told apart."""
        if not is_integer(ids):
            return
        if ids not in self.reach:
            self._hold_indices(ids, frozenset([ids]), exact=True)
            self.order[ids] = len(self.order)
        found = self._note(ids)
        if type(constant) is int:
            found.compared.add(constant)

    def _note(
        self,
        ids: Any,
        *,
        experts: int | None = None,
        counted: bool = False,
        certain: bool = False,
    ) -> _Dispatch:
        """Record a dispatch by ``ids``; sets of selecting ops that meet in one become one."""
        selectors = set(self.reach[ids])
        met = {id(d): d for s in selectors if (d := self.dispatches.get(s)) is not None}
        found = next(iter(met.values()), None) or _Dispatch(set())
        for other in list(met.values())[1:]:
            found.selectors |= other.selectors
            found.certain |= other.certain
            found.exact &= other.exact
            found.compared |= other.compared
            found.looks_up_matrices |= other.looks_up_matrices
        found.selectors |= selectors
        for selector in found.selectors:
            self.dispatches[selector] = found
        found.exact &= ids in self.exact
        if found.ids is None or (certain and not found.certain):
            found.ids = self.matrix[ids]
        found.certain |= certain
        if experts is not None and (found.experts is None or (counted and not found.counted)):
            found.experts, found.counted = experts, counted
        return found

    # -- what came of it -----------------------------------------------------------------------

    def anchors(self) -> list[Anchor]:
        dispatches = {id(d): d for s, d in self.dispatches.items() if self._is_candidate(s, d)}
        seen = {s for dispatch in dispatches.values() for s in dispatch.selectors}
        single = [n for n in self.order if n not in seen and n.target is aten.topk.default]
        inner = _upstream([*seen, *single])
        anchors = [
            self._anchor(dispatch)
            for dispatch in dispatches.values()
            if dispatch.certain or not dispatch.selectors <= inner
        ]
        anchors += [Anchor(node, (node,)) for node in single if node not in inner]
        return sorted(anchors, key=lambda anchor: self.order[anchor.node])

    def _is_candidate(self, selector: Node, dispatch: _Dispatch) -> bool:
        if is_selector(selector):
            return True
        if selector in self.given and self._takes_experts(selector, dispatch):
            return True
        return len(dispatch.compared) > 1 and _is_range(dispatch.compared)

    def _takes_experts(self, ids: Node, dispatch: _Dispatch) -> bool:
        """Whether ``ids``, which are given to the graph, bring rows to matrices, and each of them
        must name an expert."""
        grouped = dispatch.counted and self.multiplies_by_group
        known = grouped or (not dispatch.counted and bool(given_weights(ids)))
        return dispatch.looks_up_matrices or (known and dispatch.experts is not None)

    def _anchor(self, dispatch: _Dispatch) -> Anchor:
        selectors = tuple(sorted(dispatch.selectors, key=self.order.__getitem__))
        told_apart = len(dispatch.compared) > 1 and _is_range(dispatch.compared)
        experts = dispatch.experts
        if experts is None and told_apart:
            experts = len(dispatch.compared)
        selected = any(is_selector(n) for n in selectors)
        certain = selected and (dispatch.certain or told_apart)
        certain |= any(n.target is aten.topk.default for n in selectors)
        if selectors[-1] in self.given:
            weights = given_weights(selectors[-1])
            certain = self._takes_experts(selectors[-1], dispatch)
            selectors = (*weights, *selectors) if certain else selectors
            certain |= told_apart and bool(weights)
        return Anchor(selectors[-1], selectors, dispatch.ids, experts, dispatch.exact, certain)


def given_weights(ids: Node) -> list[Node]:
    """Inputs of the graph that may weigh the rows of ``ids``, which are given too: a number for
    each."""
    return [
        node
        for node in ids.graph.find_nodes(op="placeholder")
        if len(shape(ids)) > 1
        and len(shape(node)) == len(shape(ids))
        and all(map(same, shape(node), shape(ids)))
        and value(node).dtype.is_floating_point
    ]


def _marked_experts(node: Node) -> int | None:
    """How many experts a one-hot, or a scatter into a row per token, tells apart."""
    if node.target is aten.one_hot.default:
        classes = argument(node, 1, "num_classes", -1)
        return classes if isinstance(classes, int) and classes > 0 else None
    if node.target is aten.eq.Tensor:
        return None
    columns = shape(node)[argument(node, 1, "dim")]
    return columns if isinstance(columns, int) else None


def _is_range(numbers: Iterable[int]) -> bool:
    return sorted(numbers) == list(range(len(list(numbers))))


def _upstream(nodes: Iterable[Node]) -> set[Node]:
    """The selecting ops that the scores of ``nodes`` are made with, not beyond their logits."""
    seen: set[Node] = set()
    stack = [n.args[0] for n in nodes if n.args and isinstance(n.args[0], Node)]
    while stack:
        node = stack.pop()
        if not isinstance(node, Node) or node in seen or node.target in _LOGIT_OPS:
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return {n for n in seen if n.op == "call_function" and is_selector(n)}
