"""Tables of experts that the forward computes from shards: by their owner, on two ranks.

A layer's tables are dequantised, merged with adapters, pruned, normalised or joined before the
experts' rows meet them. The result and every parameter's gradient are those of eager; no gather of
experts is left. What mixes experts is declined, and ``strict`` refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe_fx.testing import RankPool
from tests.tables_on_the_way import (
    SPELLINGS,
    TABLES,
    Seen,
    layer,
    listed,
    twice,
)

_QUICK = {
    ("fp8", "gathered"),
    ("lora", "gathered"),
    ("lora", "loop_inside"),
    ("normed", "dense"),
    ("joined", "grouped"),
}
_MIXED = [name for name in TABLES if name == "centred"]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


def _cases() -> list[object]:
    return [
        pytest.param(table, spelling, marks=() if (table, spelling) in _QUICK else pytest.mark.slow)
        for table in TABLES
        for spelling in SPELLINGS
        if table not in _MIXED
    ]


def check(seen: Seen, gathers: int = 0, regions: int = 1) -> None:
    assert (seen.regions, seen.reasons) == (regions, ())
    assert seen.verified
    assert seen.gathers == gathers
    assert seen.error < 1e-5
    assert seen.gradient_error < 1e-4


@pytest.mark.parametrize(("table", "spelling"), _cases())
def test_from_shards(table: str, spelling: str, ranks: RankPool) -> None:
    for seen in ranks.run(layer, table, spelling, "gathered", timeout=120.0):
        check(seen)


@pytest.mark.slow
@pytest.mark.parametrize(("table", "spelling"), _cases())
def test_from_replicated_parameters(table: str, spelling: str, ranks: RankPool) -> None:
    for seen in ranks.run(layer, table, spelling, "replicated", timeout=120.0):
        check(seen)


@pytest.mark.parametrize("spelling", ["grouped", "loop_inside"])
def test_in_chunks_of_experts(spelling: str, ranks: RankPool) -> None:
    for seen in ranks.run(layer, "lora", spelling, "gathered", {"overlap": 2}, timeout=120.0):
        check(seen)


def test_some_parts_sharded_and_others_replicated(ranks: RankPool) -> None:
    """The weight is sharded, the adapters are not: their slices go to the owner."""
    given = {"sharded": ("experts.*.weight",)}
    for spelling in ("gathered", "loop_inside"):
        for seen in ranks.run(layer, "lora", spelling, "gathered", given, timeout=120.0):
            check(seen)


@pytest.mark.parametrize("spelling", ["grouped", "dense", "loop_inside"])
def test_experts_that_are_mixed_are_declined(spelling: str, ranks: RankPool) -> None:
    for seen in ranks.run(layer, "centred", spelling, "gathered", timeout=120.0):
        (reason,) = seen.reasons
        assert "(aten.mean.dim) mixes experts that are gathered from all ranks" in reason
        assert seen.regions == 0
        assert seen.error == 0.0


def test_strict_refuses_experts_that_are_mixed(ranks: RankPool) -> None:
    given = {"strict": True}
    for seen in ranks.run(layer, "centred", "gathered", "gathered", given, timeout=120.0):
        assert seen.strict_raised


@pytest.mark.parametrize("spelling", ["gathered", "grouped", "loop"])
def test_experts_that_two_layers_share(spelling: str, ranks: RankPool) -> None:
    for program in ("gathered", "replicated"):
        for seen in ranks.run(twice, "lora", spelling, program, timeout=120.0):
            check(seen, regions=2)


def test_each_expert_a_module_with_parameters_of_its_own(ranks: RankPool) -> None:
    """Quantised or merged within a module list: each rank computes its own experts' matrices."""
    for seen in ranks.run(listed, timeout=120.0):
        check(seen)
