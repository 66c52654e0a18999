"""Sum gradients: those that chunks have of the same weights, as one product for each expert.

Contract. In: a backward graph with dialect ops. Out: a sum whose terms are
``grouped_mm_grad_weight`` of several pieces is ``grouped_mm_grad_weight_sum`` of them all, which
writes each expert's gradient once. Chunks by rows, or by token, would each have one of all of a
rank's weights, most of it zeros. Terms may be seen through views, if all through the same (a
stack's matrices each have their gradient). Other terms are added as they were.

Pseudo-code::

    for each sum that is not a term of another one:
        its terms that show gradients, by the views through which they do
        two or more through the same -> those views of grouped_mm_grad_weight_sum(of all)

Rejects (left as they are): sums with a factor; terms of other shapes; gradients that are seen
through different views (said in the log).
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch
from torch.fx import Graph, Node

log = logging.getLogger("moe_fx")

aten = torch.ops.aten
ops = torch.ops.moe_fx

_ADD = aten.add.Tensor
_GRADIENT = ops.grouped_mm_grad_weight.default
_SUM = ops.grouped_mm_grad_weight_sum.default
_VIEWS = (
    aten.select.int,
    aten.unbind.int,
    operator.getitem,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.view.default,
    aten.reshape.default,
)

_Views = tuple[tuple[Any, ...], ...]
"""(op, its other arguments) of each view, the first that is taken first."""


def sum_gradients(graph: Graph) -> None:
    """Rewrite ``graph`` in place."""
    sums = [node for node in graph.nodes if _is_sum(node)]
    inner = {node for node in sums if len(node.users) == 1 and _is_sum(next(iter(node.users)))}
    positions = {node: at for at, node in enumerate(graph.nodes)}
    joining = _Joining(graph, inner, positions)
    for node in sums:
        if node not in inner:
            joining.join(node)


def _is_sum(node: Node) -> bool:
    plain = node.target is _ADD and not node.kwargs
    return plain and all(isinstance(term, Node) for term in node.args)


def _gradient(term: Node) -> tuple[Node, _Views] | None:
    """The gradient that ``term`` shows, and the views through which it does."""
    views: list[tuple[Any, ...]] = []
    while term.target in _VIEWS and len(term.all_input_nodes) == 1 and not term.kwargs:
        views.insert(0, (term.target, _hashable(term.args[1:])))
        (term,) = term.all_input_nodes
    return (term, tuple(views)) if term.target is _GRADIENT else None


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, (list, tuple)) else value


def _form(node: Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape), node.meta["val"].dtype


@dataclass
class _Joining:
    """inner: sums that are terms of others. positions: of nodes in the graph that was."""

    graph: Graph
    inner: set[Node]
    positions: dict[Node, int]
    joined: dict[tuple[Any, ...], Node] = field(default_factory=dict)

    def join(self, root: Node) -> None:
        total: list[Node] = []
        by_views: dict[_Views, list[tuple[int, Node, Node]]] = {}
        for term in self._terms(root):
            seen = _gradient(term)
            if seen is None or _form(term) != _form(root):
                total.append(term)
            else:
                gradient, views = seen
                by_views.setdefault(views, []).append((self.positions[gradient], gradient, term))
        if all(len(found) == 1 for found in by_views.values()):
            if len(by_views) > 1:
                log.info(
                    "the gradients of experts' weights that %s adds are of different experts or "
                    "layouts: each is computed by itself",
                    root.name,
                )
            return
        with self.graph.inserting_before(root):
            for views, found in by_views.items():
                _, gradients, terms = zip(*sorted(found, key=itemgetter(0)), strict=True)
                several = len(terms) > 1
                total.append(self._seen(gradients, views, terms[0]) if several else terms[0])
            result = total[0]
            for term in total[1:]:
                result = self._call(_ADD, (result, term), root)
        root.replace_all_uses_with(result)
        self._erase(root)

    def _terms(self, node: Node) -> list[Node]:
        terms: list[Node] = []
        for term in node.args:
            assert isinstance(term, Node)
            terms += self._terms(term) if term in self.inner else [term]
        return terms

    def _seen(self, gradients: tuple[Node, ...], views: _Views, like: Node) -> Node:
        """The sum of ``gradients`` through ``views``. like: one of its terms."""
        key = (gradients, views)
        if key not in self.joined:
            if views:
                (source,) = like.all_input_nodes
                op, others = views[-1]
                args = (self._seen(gradients, views[:-1], source), *others)
                self.joined[key] = self._call(op, args, like)
            else:
                pieces = zip(*(gradient.args for gradient in gradients), strict=True)
                self.joined[key] = self._call(_SUM, tuple(map(list, pieces)), like)
        return self.joined[key]

    def _call(self, op: Any, args: tuple[Any, ...], like: Node) -> Node:
        node = self.graph.call_function(op, args)
        node.meta = {key: like.meta[key] for key in ("val", "stack_trace") if key in like.meta}
        return node

    def _erase(self, node: Node) -> None:
        """``node``, and what was only there for it."""
        if node.users or node.target not in (_ADD, _GRADIENT, *_VIEWS):
            return
        sources = node.all_input_nodes
        self.graph.erase_node(node)
        for source in sources:
            self._erase(source)
