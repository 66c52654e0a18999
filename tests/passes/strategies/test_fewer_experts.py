"""Eight experts on ranks that do not divide them: every spelling of a block, on simulated ranks."""

from __future__ import annotations

import pytest
import torch

from tests.passes.graphs import (
    block,
    captured,
    error_on_ranks,
    rewritten,
    rewritten_on_ranks,
    tokens,
)
from tests.spellings import SPELLINGS

TOLERANCE = {torch.bfloat16: 5e-2}


@pytest.mark.parametrize("name", SPELLINGS)
def test_it_is_rewritten_as_for_two_ranks(name: str) -> None:
    """Of 3 ranks the last has 2 experts where the others have 3; of 5, none."""
    spelling = SPELLINGS[name]
    with torch.no_grad():
        case = captured(spelling.build(), spelling.tokens(seed=1))
    on_two, _ = rewritten(case.module, 2)
    for world in (3, 5):
        graphs, report = rewritten_on_ranks(case.module, world)
        assert (graphs is None) == (on_two is None), report.declined
        if graphs is not None:
            assert error_on_ranks(case, graphs) <= TOLERANCE.get(
                spelling.tokens(seed=1).dtype, 1e-5
            )


def test_graphs_for_npus_are_left_alone() -> None:
    case = captured(block("qwen3_moe"), tokens(1, 13, 64))
    graph, report = rewritten(case.module, 3, base="torchair")
    assert graph is None
    assert "8 experts do not divide by 3 ranks" in report.declined[0].reason


def test_mc2_says_that_it_takes_no_such_layer() -> None:
    case = captured(block("qwen3_moe"), tokens(1, 13, 64))
    graph, report = rewritten(case.module, 3, strategy="mc2")
    assert graph is None
    assert "8 experts do not divide by 3 ranks" in report.declined[0].reason
