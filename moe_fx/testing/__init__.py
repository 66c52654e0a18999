"""What others need to test that moe_fx understands their model: docs/testing.md.

- `assert_matches`, `assert_declined`: what is found in a model, and why not.
- `assert_equivalent`: compiled on real ranks, it computes what it computes in eager.
- `capture`, `rewritten`: the graphs, to look at or to run `torch.testing.FileCheck` over.
- `RankPool`, `run_ranks`: ranks of this machine, for tests of one's own. In pytest, the fixture
  ``moe_fx_ranks`` gives pools that a session shares.
"""

from __future__ import annotations

from moe_fx.testing.equivalence import assert_equivalent
from moe_fx.testing.graphs import capture, capture_all, rewritten
from moe_fx.testing.matching import assert_declined, assert_matches
from moe_fx.testing.ranks import RankError, RankPool, run_ranks

__all__ = [
    "RankError",
    "RankPool",
    "assert_declined",
    "assert_equivalent",
    "assert_matches",
    "capture",
    "capture_all",
    "rewritten",
    "run_ranks",
]
