"""What a node near a selection is made of: routing, tokens, parameters, or rows made of both.

Kinds, relative to one selection:

- *route*: computed from the router's logits (or from ids given from outside), and of nothing else
  that varies with the tokens;
- *parameter*: views, casts and the like of one parameter, input or gathered shard;
- *buffer*: its entries depend on no tensor's;
- *activation*: anything else that no selected index is needed for, the tokens among them;
- *table*: looked up in a parameter by routing values: each row's own entry;
- *mixed*: of routing and activations: dispatched or weighted rows.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node

from moe_fx.compat import number, symbols
from moe_fx.graph.flow import closure
from moe_fx.graph.gathers import gather_of
from moe_fx.graph.names import view_root
from moe_fx.graph.nodes import (
    ELEMENTWISE_COPIES,
    VIEWS,
    is_integer,
    same,
    shape,
    tensor_inputs,
    value,
)
from moe_fx.graph.parameters import is_for_experts, is_noted
from moe_fx.graph.refusal import NoExperts, Refusal
from moe_fx.graph.selectors import is_selector
from moe_fx.passes.recognise.by_value.rows.layout import is_buffer
from moe_fx.passes.roles import Selection

aten = torch.ops.aten
_SUMS_OVER_RANKS = (
    torch.ops._c10d_functional.all_reduce.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
)

What = Literal["route", "parameter", "table", "buffer", "activation", "mixed"]

_SCORES = (
    aten.linear.default,
    aten.mm.default,
    aten.addmm.default,
    aten.matmul.default,
    aten.bmm.default,
    aten.embedding.default,
    aten.einsum.default,
)
_REPEATS = (
    *VIEWS,
    *ELEMENTWISE_COPIES,
    aten.repeat.default,
    aten.expand.default,
    aten.unsqueeze.default,
    aten.repeat_interleave.self_int,
    aten.transpose.int,
    aten.stack.default,
)


_UNKNOWN = 10007  # stands for a data-dependent size


class Surroundings:
    """logits: where routing begins. scored: what the logits are computed from."""

    def __init__(self, selection: Selection) -> None:
        self.selection = selection
        self.logits = _logits(selection)
        scored = [_first_operand(node) for node in self.logits]
        self.scored = [node for node in scored if node is not None]
        self._above = self._varying(closure(self.scored, lambda node: node.all_input_nodes))
        self._what: dict[Node, What] = dict.fromkeys(self.logits, "route")
        self._what |= dict.fromkeys(selection.selectors, "route")

    def _varying(self, above: set[Node]) -> set[Node]:
        """Of the nodes that tokens are made of, those that vary with the tokens: an earlier layer
        may have the same parameters."""
        lead = self.selection.lead or (self.selection.num_tokens,)
        leaves = [
            node
            for node in above
            if node.op != "call_function"
            and not is_noted(node)
            and not is_for_experts(node, self.selection.num_experts, lead)
        ]

        def readers(node: Node) -> list[Node]:
            return [user for user in node.users if user in above and gather_of(user) is None]

        return closure(leaves, readers)

    def what(self, node: Node) -> What:
        stack = [node]
        while stack:
            current = stack[-1]
            if current not in self._what:
                missing = [n for n in self._needed(current) if n not in self._what]
                if missing:
                    stack += missing
                    continue
                self._what[current] = self._judge(current)
            stack.pop()
        return self._what[node]

    def _needed(self, node: Node) -> list[Node]:
        if node in self._above or is_buffer(node) or gather_of(node) is not None:
            return []
        return tensor_inputs(node) if node.op == "call_function" else []

    def _judge(self, node: Node) -> What:
        if node in self._above:
            return "activation"
        if is_buffer(node):
            return "buffer"
        if gather_of(node) is not None:
            return "parameter"
        if node.op != "call_function":
            return "activation" if self._is_unscored(node) else "parameter"
        sources = tensor_inputs(node)
        kinds = {self._what[n] for n in sources}
        if not kinds or kinds == {"buffer"}:
            return "buffer"
        if self._scores_given_ids(node, kinds):
            self.logits.append(node)
            return "route"
        if "mixed" in kinds or {"route", "activation"} <= kinds:
            return "mixed"
        if "table" in kinds:
            return "mixed" if "activation" in kinds else "table"
        if "route" in kinds:
            looked_up = any(self._what[n] == "parameter" and self._is_table(n) for n in sources)
            return "table" if looked_up else "route"
        computed = len(sources) > 1 and self._is_unscored(node)
        return "activation" if computed or "activation" in kinds else "parameter"

    def _is_table(self, node: Node) -> bool:
        """Floats that may have an entry per expert; not one that has one per token (a scale). There
        may be as many tokens as experts: what the model owns has no entry per token."""
        dims = shape(node)
        floating = len(dims) > 1 and value(node).dtype.is_floating_point
        return floating and (not _leads(dims, self.selection) or _is_of_model(node))

    def is_above(self, node: Node) -> bool:
        """Whether the logits are computed from ``node``."""
        return node in self._above

    def _scores_given_ids(self, node: Node, kinds: set[What]) -> bool:
        """Where ids are given, logits are read only to weigh: a score per token and expert."""
        dims = shape(node)
        return (
            self.selection.looked_up
            and node.target in _SCORES
            and kinds <= {"activation", "parameter"}
            and len(dims) > 1
            and dims[-1] == self.selection.num_experts
            and _leads(dims, self.selection)
        )

    def _is_unscored(self, node: Node) -> bool:
        """A row per token, where no logits tell what the tokens are: an input of the graph, or
        computed from several."""
        dims, lead = shape(node), self.selection.lead or (self.selection.num_tokens,)
        if not dims or self.scored or not isinstance(value(node), Tensor):
            return False
        return len(dims) >= len(lead) and all(map(same, dims, lead)) and not is_integer(node)

    # -- the tokens ----------------------------------------------------------------------------

    def tokens_of(self, node: Node, experts: Collection[Node]) -> list[Node]:
        """The tokens that the rows of ``node`` are made of: views of one tensor, each with a row
        per token. ``experts``: nodes known to be experts' rows. Raises `Refusal` if there is not
        exactly one such tensor."""
        found: dict[Node, None] = {}
        seen, stack = {node}, list(tensor_inputs(node))
        while stack:
            current = stack.pop()
            if current in seen:
                continue
            seen.add(current)
            what = self.what(current)
            if what == "mixed" or (what == "activation" and current in experts):
                stack += tensor_inputs(current)
            elif what == "activation":
                found[self._one_row_per_token(current)] = None
        roots = {view_root(tokens) for tokens in found}
        if len(roots) != 1:
            names = ", ".join(sorted(n.name for n in found)) or "none"
            raise Refusal(f"the experts' rows are made of {names}, expected one tensor", node, 2)
        return list(found)

    def _one_row_per_token(self, node: Node) -> Node:
        current = node
        while not self.is_token_shaped(current):
            if current.target not in _REPEATS or not tensor_inputs(current):
                raise NoExperts(
                    node,
                    f"{node} {list(shape(node))} does not hold the {self.selection.num_tokens} "
                    "tokens that experts are selected for",
                    progress=2,
                )
            current = tensor_inputs(current)[0]
        return current

    def is_token_shaped(self, node: Node) -> bool:
        """``[T, H]``, or with the tokens counted by several dims."""
        return self.counts_tokens(node) and isinstance(shape(node)[-1], int)

    def counts_tokens(self, node: Node) -> bool:
        """Whether all dims of ``node`` but the last count tokens, as many as when captured (where
        their number is not fixed, ``[2, T // 2, H]`` may have ``T``)."""
        dims = shape(node)
        if len(dims) < 2 or not value(node).dtype.is_floating_point:
            return False
        known = symbols([*dims[:-1], self.selection.num_tokens], _UNKNOWN)
        total = math.prod(number(size, known) for size in dims[:-1])
        return total == number(self.selection.num_tokens, known)


def _is_of_model(node: Node) -> bool:
    """Computed from parameters alone, or from experts that the ranks gather."""

    def sources(current: Node) -> list[Node]:
        return [] if gather_of(current) is not None else tensor_inputs(current)

    return all(n.op == "call_function" or is_noted(n) for n in closure([node], sources))


def post_dominators(starts: list[Node], limit: int) -> Iterator[Node]:
    """Nodes that all paths from ``starts`` to the end of the graph pass through, in order; at most
    ``limit`` nodes are looked at."""
    import heapq

    seen = {user for node in starts for user in node.users}
    queue = list(seen)
    heapq.heapify(queue)
    while queue and limit:
        limit -= 1
        node = heapq.heappop(queue)
        if node.op == "output":
            return
        if not queue:
            yield node
        for user in node.users:
            if user not in seen:
                seen.add(user)
                heapq.heappush(queue, user)


def is_summed_over_ranks(node: Node) -> bool:
    """Whether a collective adds up ``node``: it is then one rank's share (tensor parallelism)."""
    readers = list(node.users)
    while readers:
        reader = readers.pop()
        if reader.target in _SUMS_OVER_RANKS:
            return True
        if reader.target in (*VIEWS, *ELEMENTWISE_COPIES):
            readers += reader.users
    return False


def _logits(selection: Selection) -> list[Node]:
    """Where the scores that experts are selected by come from; ids, if they are given."""
    if selection.looked_up:
        return [selection.node]
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    stack: list[Any] = [node.args[0] for node in selection.selectors]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _SCORES:
            found[node] = None
        elif node.op != "call_function":
            if _may_be_scores(node, selection):
                found[node] = None
        else:
            stack += tensor_inputs(node)
    return list(found)


def _may_be_scores(node: Node, selection: Selection) -> bool:
    """Whether an input of the graph may hold a score per token and expert: no mask of tokens."""
    dims, val = shape(node), value(node)
    if len(dims) < 2 or same(dims[-1], 1) or not val.dtype.is_floating_point:
        return False
    return _leads(dims, selection)


def inner_selectors(selection: Selection) -> list[Node]:
    """The selection's ops and those that its scores are made with, in graph order."""
    found, stack = set(selection.selectors), list(selection.selectors)
    seen = set(stack)
    while stack:
        node = stack.pop()
        if is_selector(node):
            found.add(node)
        for source in tensor_inputs(node):
            if source not in seen and source.target not in _SCORES:
                seen.add(source)
                stack.append(source)
    return sorted(found)


def _leads(dims: tuple[Any, ...], selection: Selection) -> bool:
    if len(dims) > 1 and same(dims[0], selection.num_tokens):
        return True
    lead = selection.lead
    return len(dims) >= len(lead) and all(map(same, dims, lead))


def _first_operand(node: Node) -> Node | None:
    if node.op != "call_function" or node.target not in _SCORES:
        return None
    sources = tensor_inputs(node)
    at = 1 if node.target is aten.addmm.default else 0
    return sources[at] if len(sources) > at else None
