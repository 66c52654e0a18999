"""Overlap: exchanges start as early, and are waited for as late, as what depends on them allows.

Contract. In: a graph whose exchanges are starts and waits. Out: the same nodes in another order, in
which no collective has passed another. Runs once more on what the base compiler made of the graph
(`moe_fx/bases/inductor.py`), where gradients of chunks are summed (`sum_gradients`).
"""

from __future__ import annotations

from moe_fx.passes.overlap.overlap import Overlap

__all__ = ["Overlap"]
