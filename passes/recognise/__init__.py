"""Recognise: which nodes are an MoE layer, and what each of them means.

Contract. In: a normalised graph. Out: a `Region` per layer, and a `Declined` per other candidate,
with the reason and its source line. A candidate is a selection of experts (`anchors`, `selection`);
it is read by rules (`by_rule`), op by op, or by value (`by_value`), as a weighted sum of experts'
rows that is proved by running it. A layer whose program exchanges tokens itself is read in
`exchanged`; what the router computes in `router`.

To add: a new way to bring rows to experts -> a rule in `by_rule`; a new op in experts' bodies ->
`by_value/rows`; a new score function -> `router/scores.py`.
"""

from __future__ import annotations

from moe_fx.passes.recognise.recognise import Recognise

__all__ = ["Recognise"]
