"""Read a region by value: any spelling whose experts' body can be laid out by rows.

Contract. In: a selection. Out: `Reading`: tokens, ids, weights, body and result such that

    result = base + sum over k of weights[t, k] * body(expert ids[t, k], tokens[t])

(or with the weights inside, on the tokens), proved on random tokens, parameters and router logits:
random, one expert for all, ties, extreme scores, fewer and more tokens than captured where their
number is not fixed. Raises `Refusal` with the first condition that failed.

How rows travel between tokens and experts (index, one-hot matmul, capacity buffer, mask, loop) is
never looked at: only that the result is as above. So any dispatch is read, and a dispatch that does
anything else is refused with what it did to the values. Where a token's row is dropped the weight
that the model gives it is zero.

Pseudo-code::

    starts = first op that reads a table of experts, or the E copies of an unrolled body
    for each node that all of their results flow into and that has a row per token:
        body = the experts' part of what is above it, by rows (`row_layout.py`)
        run the graph from logits and tokens to it, and the body on the pairs
        ids, weights = those of the router's values with which the sum is the result
        the same holds in every further trial -> Reading
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

import torch
from torch.fx import Graph, Node

from moe_fx.compat import FakeValues
from moe_fx.graph.nodes import (
    ELEMENTWISE_COPIES,
    is_pointwise,
    same,
    shape,
    tensor_inputs,
)
from moe_fx.graph.refusal import NoExperts, Refusal
from moe_fx.passes.evaluate.typical import kind_of
from moe_fx.passes.recognise.anchors import Anchor
from moe_fx.passes.recognise.by_value.copies import Copies, Pairing
from moe_fx.passes.recognise.by_value.known_proofs import KnownProofs
from moe_fx.passes.recognise.by_value.rows.layout import Body
from moe_fx.passes.recognise.by_value.rows.row_layout import RowLayout
from moe_fx.passes.recognise.by_value.samples import Ids, Weighing
from moe_fx.passes.recognise.by_value.selected_ids import ids_of, selections, some_experts
from moe_fx.passes.recognise.by_value.shared_ids import shared_by_rows
from moe_fx.passes.recognise.by_value.split_sum import split_sum
from moe_fx.passes.recognise.by_value.starts import Starts
from moe_fx.passes.recognise.by_value.surroundings import (
    Surroundings,
    is_summed_over_ranks,
    post_dominators,
)
from moe_fx.passes.recognise.by_value.trials import Trials
from moe_fx.passes.recognise.by_value.unseen import check_chance, check_rounding
from moe_fx.passes.recognise.by_value.weighing import Proof
from moe_fx.passes.recognise.selection import select
from moe_fx.passes.roles import Selection
from moe_fx.region import Effect

aten = torch.ops.aten

_LOOK_AHEAD = 400
_CANDIDATES = 6


@dataclass(frozen=True)
class Reading:
    """What was found and proved. tokens: ``[.., H]``, the last dim features. result: the captured
    node; base: what the rows are added to (None: zeros). body: from sorted rows to the experts'
    rows. captured: the nodes that the reading replaces, and which part of the layer each is.
    effects: of each input that the captured nodes read."""

    selection: Selection
    tokens: Node
    ids: Ids
    weighing: Weighing
    body: Body
    result: Node
    base: Node | None
    captured: dict[Node, str]
    form: str
    effects: tuple[Effect, ...]


class Readings:
    """Reads regions of one graph."""

    def __init__(self, graph: Graph, training: bool, anchors: Sequence[Anchor] = ()) -> None:
        self.graph = graph
        self._selections = [anchor.node for anchor in anchors]
        self.proofs = KnownProofs(training)

    def next_selection(self, node: Node) -> Node | None:
        """Where the next layer may begin."""
        return next((found for found in self._selections if node < found), None)

    @cached_property
    def copies(self) -> Copies:
        return Copies(self.graph)

    @cached_property
    def values(self) -> FakeValues:
        return FakeValues(self.graph)

    def read(self, anchor: Anchor) -> Reading:
        """The region of ``anchor``'s selection."""
        attempts = Attempts(NoExperts(anchor.node))
        for selection in selections(anchor):
            with attempts:
                return _Reader(selection, ids_of(anchor, selection), self).read()
        shared = shared_by_rows(select(anchor), self.values)
        if shared is not None:
            with attempts:
                return _Reader(shared.selection, Ids((shared.ids,)), self).read()
            shared.undo()
        raise attempts.furthest


class Attempts:
    """``with attempts: return …``: a refusal is kept if none got further, and the next tried."""

    def __init__(self, otherwise: Refusal) -> None:
        self.furthest = otherwise

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, Refusal):
            return False
        if error.progress > self.furthest.progress:
            self.furthest = error
        return True


class _Reader:
    def __init__(self, selection: Selection, ids: Ids, readings: Readings) -> None:
        self.selection, self.ids, self.readings = selection, ids, readings
        self.around = Surroundings(selection)
        end = readings.next_selection(selection.node)
        self.starts = Starts(selection, self.around, lambda: readings.copies, end)
        if not self.around.logits:
            raise Refusal("no scores of experts were found above the selection", selection.node, 0)

    def read(self) -> Reading:
        attempts = Attempts(NoExperts(self.selection.node))
        for starts, pairing in self.starts.found():
            with attempts:
                return self.read_from(starts, pairing)
        if isinstance(attempts.furthest, NoExperts):
            raise some_experts(self.ids, self.selection) or attempts.furthest
        raise attempts.furthest

    # -- what they are -------------------------------------------------------------------------

    def read_from(self, starts: list[Node], pairing: Pairing) -> Reading:
        tokens = self.around.tokens_of(starts[0], pairing.inside)
        results = list(self._results(starts))
        reason = "the experts' rows are never all summed to one row per token"
        where = self.readings.graph.output_node().meta.get("graph_break")
        if where is not None and not results:
            reason += f", before a graph break at {where}"
        attempts = Attempts(Refusal(reason, starts[0], 2 if results else 4))
        found: Reading | None = None
        for at, result in enumerate(results):
            with attempts:
                if at == 0:
                    check_chance(self._between(tokens, result), starts, pairing.inside)
            with attempts:
                reading = self._reading(tokens, starts, pairing, result)
                if reading.weighing.node is not None:
                    return reading
                found = found or reading  # weighed further on, perhaps (Switch)
                continue
            if found is None:
                with attempts:
                    return self._reading_of_split(tokens, starts, pairing, result)
        if found is not None:
            return found
        raise attempts.furthest

    def _reading_of_split(
        self, tokens: list[Node], starts: list[Node], pairing: Pairing, result: Node
    ) -> Reading:
        """With a matmul that sums the experts' rows taken apart."""
        layout = self._layout(tokens, pairing)
        split = None
        for node in self._between(tokens, result):
            try:
                layout.lay(node)
            except Refusal:
                split = split_sum(node, layout, self.readings.values)
                break
        if split is None:
            raise Refusal("no matmul sums the experts' rows", result, 0)
        try:
            return self._reading(tokens, starts, pairing, result)
        except Refusal:
            split.undo()
            raise

    def _results(self, starts: list[Node]) -> Iterator[Node]:
        found = (
            node
            for node in post_dominators(starts, _LOOK_AHEAD + 8 * len(starts))
            if self.around.counts_tokens(node) and self.around.what(node) == "mixed"
        )
        return islice(found, _CANDIDATES)

    def _reading(
        self,
        tokens: list[Node],
        starts: list[Node],
        pairing: Pairing,
        result: Node,
    ) -> Reading:
        if is_summed_over_ranks(result):
            raise Refusal(
                "the result is summed over ranks, so no rank holds whole experts", result, 6
            )
        layout = self._layout(tokens, pairing)
        if pairing.differ:
            cut = starts[0]
            layout.lay(cut)
        else:
            cut = self._cut(layout, tokens, result)
        laid = layout.laid[cut]
        if laid.kind != "rows" or not laid.met or laid.node is None:
            raise Refusal("the rows meet no expert's matrix", cut, 3)
        body = layout.body
        body.finish(laid.node)
        if not any(n.target in _MATMULS for n in body.graph.nodes):
            raise Refusal("the rows meet no expert's matrix", cut, 3)
        trials = Trials(self.selection, self.around, tokens, result, body, self.ids.nodes)
        base = _base(trials, self.around, [*tokens, *starts], result)
        check_rounding(self.around, trials, layout, cut)
        proof = self._proof(trials, body, base, layout)
        weighing = proof.weighing
        return Reading(
            selection=self.selection,
            tokens=tokens[0],
            ids=self.ids,
            weighing=weighing,
            body=body,
            result=result,
            base=base,
            captured=self._captured(trials, layout, weighing),
            form=self._form(pairing, trials.nodes),
            effects=self._effects(trials, proof),
        )

    def _effects(self, trials: Trials, proof: Proof) -> tuple[Effect, ...]:
        def what(node: Node) -> str:
            if node in trials.tokens:
                return "tokens"
            return "logits" if node in self.around.logits else kind_of(node)

        return tuple(Effect(n.name, what(n), by) for n, by in proof.changes.items())

    def _proof(self, trials: Trials, body: Body, base: Node | None, layout: RowLayout) -> Proof:
        try:
            return self.readings.proofs.prove(trials, self.ids, body, base)
        except Refusal as refusal:
            if layout.not_constant is not None:
                raise layout.not_constant from None  # the body may go on above it
            for node in filter(self.starts.reads_table, trials.nodes):
                if refusal.progress == 6 and node not in layout.laid:
                    self._explain(layout, node)
            raise

    def _explain(self, layout: RowLayout, node: Node) -> None:
        """Why rows that meet a table of experts in ``node`` were not read up to there."""
        try:
            layout.lay(node)
        except Refusal as refusal:
            raise Refusal(refusal.reason, refusal.node, 6) from None

    def _layout(self, tokens: list[Node], pairing: Pairing) -> RowLayout:
        return RowLayout(
            tokens,
            self.selection.num_experts,
            lambda node: self.around.what(node) == "route",
            lambda node: self.around.what(node) == "parameter",
            pairing.differ,
            self.starts.copies_of,
        )

    def _cut(self, layout: RowLayout, tokens: list[Node], result: Node) -> Node:
        """The experts' result: the last op above ``result`` in which rows meet a table."""
        above = self._between(tokens, result)
        first: Refusal | None = None
        for node in above:
            try:
                layout.lay(node)
            except Refusal as refusal:
                first = first or refusal
        if not layout.met:
            raise first or Refusal("the rows meet no table of experts", result, 3)
        cut = max(layout.met)
        inside = set(self._between(tokens, cut))
        apart = [node for node in layout.met if node not in inside]
        if apart:
            raise Refusal("the experts have more than one result", apart[0], 4)
        while len(cut.users) == 1:
            (user,) = cut.users
            if user is result or user not in layout.laid or not _is_scaled(user, cut, layout):
                break
            cut = user
        return cut

    def _between(self, tokens: list[Node], end: Node) -> list[Node]:
        """What ``end`` is made of, from the tokens on: no routing, no parameters."""
        found, stack = {end}, [end]
        while stack:
            for source in tensor_inputs(stack.pop()):
                if source in found or source in tokens:
                    continue
                if self.around.what(source) in ("mixed", "activation", "table"):
                    found.add(source)
                    stack.append(source)
        return sorted(n for n in found if not self.around.is_above(n))

    def _captured(self, trials: Trials, layout: RowLayout, weighing: Weighing) -> dict[Node, str]:
        ends = [n for n in (*self.ids.nodes, weighing.node, weighing.mask) if n is not None]
        routing, stack = set(ends), list(ends)
        while stack:
            for source in stack.pop().all_input_nodes:
                if source not in routing and self.around.what(source) == "route":
                    routing.add(source)
                    stack.append(source)
        part_of: dict[Node, str] = {}
        for node in trials.nodes:
            laid = layout.laid.get(node)
            if node in routing:
                part_of[node] = "router"
            elif self.around.what(node) in ("parameter", "table") or (laid and laid.met):
                part_of[node] = "experts"
            elif laid or self.around.what(node) in ("route", "buffer"):
                part_of[node] = "dispatch"
            else:
                part_of[node] = "combine"
        return part_of

    def _form(self, pairing: Pairing, nodes: Sequence[Node]) -> str:
        if pairing.differ:
            return "loop"
        targets = {node.target for node in nodes}
        if any("grouped_mm" in str(target) for target in targets):
            return "grouped_mm"
        looked_up = [
            n
            for n in nodes
            if n.target in (aten.index.Tensor, aten.index_select.default, aten.embedding.default)
            and self.around.what(n.args[0]) == "parameter"  # type: ignore[arg-type]
            and len(shape(n.args[0])) > 2
        ]
        return "batched_mm" if looked_up else "dense"


_MATMULS = (torch.ops.moe_fx.grouped_mm.default,)


def _is_scaled(user: Node, cut: Node, layout: RowLayout) -> bool:
    """Whether ``user`` is a cast, or a product with constants, of the experts' rows."""
    if user.target in ELEMENTWISE_COPIES:
        return True
    others = [n for n in tensor_inputs(user) if n is not cut]
    return is_pointwise(user) and all(layout.laid[n].kind == "constant" for n in others)


def _base(trials: Trials, around: Surroundings, others: list[Node], result: Node) -> Node | None:
    """What the experts' rows are added to, if not zeros. ``others`` are known to be rows."""
    region = {*trials.nodes}
    found = [
        node
        for node in [*trials.inputs, *trials.nodes]
        if node not in others
        and around.is_token_shaped(node)
        and len(shape(node)) == len(shape(result))
        and all(map(same, shape(node)[:-1], shape(result)[:-1]))
        and (same(shape(node)[-1], shape(result)[-1]) or not isinstance(shape(result)[-1], int))
        and around.what(node) == "activation"
        and any(user in region and around.what(user) == "mixed" for user in node.users)
    ]
    if len(found) > 1:
        names = ", ".join(node.name for node in found)
        reason = f"the experts' rows are added to more than one tensor: {names}"
        raise Refusal(f"{reason} (or not all experts compute the same)", result, 4)
    return found[0] if found else None
