"""Proofs of layers that are equal but for names are made once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch.fx import Node

from moe_fx.graph.refusal import Refusal
from moe_fx.passes.evaluate.extract import extract, structure
from moe_fx.passes.recognise.by_value.rows.layout import Body
from moe_fx.passes.recognise.by_value.samples import Ids, Weighing
from moe_fx.passes.recognise.by_value.trials import Trials
from moe_fx.passes.recognise.by_value.weighing import Proof, prove


@dataclass(frozen=True)
class _Known:
    """A proof, with positions in place of nodes."""

    node: int | None
    mask: int | None
    weighing: Weighing
    changes: dict[int, float]

    @staticmethod
    def of(proof: Proof, at: dict[Node, int]) -> _Known:
        weighing = proof.weighing
        node, mask = (None if n is None else at[n] for n in (weighing.node, weighing.mask))
        return _Known(node, mask, weighing, {at[n]: by for n, by in proof.changes.items()})

    def proof(self, members: Sequence[Node]) -> Proof:
        node, mask = (None if at is None else members[at] for at in (self.node, self.mask))
        weighing = replace(self.weighing, node=node, mask=mask)
        return Proof(weighing, {members[at]: by for at, by in self.changes.items()})


class KnownProofs:
    """Of one graph."""

    def __init__(self, training: bool) -> None:
        self.training = training
        self._proved: dict[str, _Known | str] = {}

    def prove(self, trials: Trials, ids: Ids, body: Body, base: Node | None) -> Proof:
        """`weighing.prove`, once for equal layers."""
        alone = extract(trials.nodes, [trials.result])
        members = [*alone.inputs, *trials.nodes]
        at = {node: position for position, node in enumerate(members)}
        marked = [trials.tokens, trials.around.logits, ids.nodes, [base] if base else []]
        places = [[at.get(node, -1) for node in nodes] for nodes in marked]
        operands = [
            [at.get(n, -1) for n in ((of,) if isinstance(of, Node) else of)]
            for of in body.operands.values()
        ]
        key = f"{structure(alone)}\n{body.text()}\n{trials.selection.sizes} {places} {operands}"
        known = self._proved.get(key)
        if isinstance(known, str):
            raise Refusal(known, trials.result, 6)
        if known is None:
            try:
                proof = prove(trials, ids, body, base, self.training)
            except Refusal as refusal:
                if refusal.progress == 6:
                    self._proved[key] = refusal.reason
                raise
            known = self._proved[key] = _Known.of(proof, at)
        return known.proof(members)
