"""Look-alikes stay as they are, with a reason; odd but legal layers keep their values."""

from __future__ import annotations

import pytest
import torch

from tests.not_moe import LOOK_ALIKES
from tests.passes.graphs import (
    captured,
    relative_error,
    rewritten,
    rewritten_on_ranks,
    run_ranks,
    tokens,
)

EXACT = 1e-5
LEGAL = [name for name, odd in LOOK_ALIKES.items() if odd.legal]
FALSE = [name for name, odd in LOOK_ALIKES.items() if not odd.legal]


@pytest.mark.parametrize("name", FALSE)
def test_a_look_alike_stays_as_it_is(name: str) -> None:
    """Without verification too: the rules alone must see it."""
    look_alike = LOOK_ALIKES[name]
    case = captured(look_alike.build(), tokens(*look_alike.input_shape))
    graph, report = rewritten(case.module, world=2, verify="off")
    assert graph is None and not report.regions
    assert bool(report.declined) == bool(look_alike.reason)
    for declined in report.declined:
        assert look_alike.reason in declined.reason
        assert declined.node and declined.source


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", LEGAL)
def test_an_odd_layer_is_declined_or_right(name: str, world: int) -> None:
    odd = LOOK_ALIKES[name]
    if odd.random and world > 1:
        pytest.skip("simulated ranks draw from one generator")
    case = captured(odd.build(), tokens(*odd.input_shape))
    graphs, report = rewritten_on_ranks(case.module, world)
    if graphs is None:
        assert odd.reason and any(odd.reason in d.reason for d in report.declined)
        return
    inputs = [case.other_inputs(seed=10 + rank) for rank in range(world)]
    expected = []
    with torch.no_grad():
        for values in inputs:
            torch.manual_seed(5)
            expected.append(case.module(*values))
    torch.manual_seed(5)
    assert relative_error(expected, run_ranks(graphs, inputs)) <= EXACT
