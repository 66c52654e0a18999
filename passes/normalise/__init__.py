"""Normalise: one spelling for each operation, so that recognition has fewer to know.

Contract. In: a captured graph. Out: a copy of equal value; `Context.origin` leads back. Rejects
nothing: what it does not know stays.

To add: another spelling of an op -> `normalise`; the pieces that an op decomposes into ->
`decomposed`.
"""

from __future__ import annotations

from moe_fx.passes.normalise.normalise import Normalise

__all__ = ["Normalise"]
