"""Verify: each rewrite, run beside what was captured, on values of every rank.

Contract. In: regions and plans. Out: the regions that were proved, with what each input's effect
was; the others are declined. `Describe` says what their bodies compute, `NewSizes` whether they
hold sizes that only running gives.
"""

from __future__ import annotations

from moe_fx.passes.verify.describe import Describe
from moe_fx.passes.verify.new_sizes import NewSizes
from moe_fx.passes.verify.verify import Verify

__all__ = ["Describe", "NewSizes", "Verify"]
