"""Starts: where the experts of a selection begin, for reading by value.

Contract. In: a selection and what is around it. Out: candidates, likeliest first: the first op that
reads a table of experts, or the E copies of an unrolled body, with the parameters they differ in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from torch.fx import Node

from moe_fx.graph.nodes import same, shape, tensor_inputs, value
from moe_fx.passes.recognise.by_value.copies import Copies, Pairing, paired
from moe_fx.passes.recognise.by_value.surroundings import Surroundings
from moe_fx.passes.roles import Selection

_CUTS = 4


@dataclass
class Starts:
    """copies: of the whole graph, made when asked for. end: where the next layer may begin."""

    selection: Selection
    around: Surroundings
    copies: Callable[[], Copies]
    end: Node | None

    def found(self) -> Iterator[tuple[list[Node], Pairing]]:
        first = min(self.around.scored or self.around.logits)
        stacked = next((n for n in self._from(first) if self.reads_table(n)), None)
        if stacked is not None:
            yield [stacked], Pairing()
        num = self.selection.num_experts
        if num > 1:
            yield from islice(self._unrolled(num, first), _CUTS)

    def _from(self, first: Node) -> Iterator[Node]:
        node = first
        while node.op != "output":
            yield node
            node = node.next

    def reads_table(self, node: Node) -> bool:
        """Whether ``node`` is an op on tokens that reads a table with a matrix per expert."""
        if node.op != "call_function" or node in self.around.logits or self.around.is_above(node):
            return False
        if self.around.what(node) not in ("mixed", "activation"):
            return False
        return any(map(self._is_stacked, tensor_inputs(node)))

    def _is_stacked(self, node: Node) -> bool:
        if self.around.what(node) == "table":
            return len(shape(node)) > 2
        dims = shape(node)
        return (
            len(dims) > 2
            and any(same(size, self.selection.num_experts) for size in dims)
            and value(node).dtype.is_floating_point
            and self.around.what(node) == "parameter"
        )

    def _unrolled(self, num: int, first: Node) -> Iterator[tuple[list[Node], Pairing]]:
        for nodes in self.copies().of(num, first, self.end):
            if self.around.what(nodes[0]) in ("mixed", "activation"):
                pairing = self.paired(nodes)
                if pairing and any(len(shape(leaf)) > 1 for leaf in pairing.differ):
                    yield nodes, pairing

    def paired(self, nodes: Sequence[Node]) -> Pairing | None:
        around = self.around

        def outside(node: Node) -> bool:
            return around.what(node) in ("route", "buffer") or (
                around.what(node) == "activation" and around.is_above(node)
            )

        return paired(nodes, outside, lambda node: around.what(node) == "parameter")

    def copies_of(self, nodes: Sequence[Node]) -> dict[Node, Node | tuple[Node, ...]] | None:
        """Parameters of nodes that compute the same with every expert's."""
        if len({self.copies().colours[node] for node in nodes}) != 1:
            return None
        pairing = self.paired(nodes)
        return pairing.differ if pairing and pairing.differ else None
