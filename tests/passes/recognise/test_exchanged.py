"""Programs that exchange tokens themselves are recognised and left as they are (two real ranks)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_fx
from moe_fx import passes
from moe_fx.options import Options
from moe_fx.passes.recognise.exchanged.exchanged import ExchangedParts
from moe_fx.report import Report
from moe_fx.testing import RankPool
from tests.exchanged import BUILDERS, PROGRAMS
from tests.passes.graphs import captured, relative_error

EXACT = 1e-5


@dataclass
class Seen:
    """What a rank's passes said of one program, with nodes by name."""

    regions: list[dict[str, Any]]
    declined: list[dict[str, Any]]
    parts: dict[str, Any]
    untouched: bool
    error: float


def look(rank: int, name: str, dynamic: bool = False) -> Seen:
    program = BUILDERS[name]
    x = program.tokens(rank)
    case = captured(program.build(rank, 2), x, dynamic=dynamic)
    before = str(case.module.code)
    report = Report()
    context = passes.Context(options=Options(), report=report)
    result = passes.run(case.module, context)
    parts: dict[str, Any] = {}
    for region in report.regions:
        assert isinstance(region.parts, ExchangedParts)
        parts = {key: getattr(region.parts, key) for key in ("kind", "group_name", "world_size")}
        for key in ("dispatch", "combine", "sort", "sent_counts", "received_counts", "weights"):
            node = getattr(region.parts, key)
            parts[key] = None if node is None else str(node.target)
        parts["tables"] = [list(t.meta["val"].shape) for t in region.parts.tables]
        parts["splits"] = [len(region.parts.send_splits), len(region.parts.receive_splits)]
    whole = program.whole()
    with torch.no_grad():
        found, expected = case.module(*case.inputs), whole(x)
    return Seen(
        **{key: report.to_dict()[key] for key in ("regions", "declined")},
        parts=parts,
        untouched=result is case.module and str(case.module.code) == before,
        error=_error(expected, found),
    )


def _error(expected: Any, found: Any) -> float:
    left, right = _first(expected), _first(found)
    return relative_error(left, right.view_as(left)) if left.numel() == right.numel() else 1.0


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


@pytest.mark.parametrize("name", [n for n, p in PROGRAMS.items() if p.kind == "alltoall"])
def test_an_all_to_all_program_is_recognised(ranks2: RankPool, name: str) -> None:
    for seen in ranks2.run(look, name):
        assert seen.untouched and seen.error <= EXACT and not seen.declined
        (region,) = seen.regions
        assert region["program"] == "exchanged"
        assert (region["num_experts"], region["top_k"]) == (8, 2)
        assert region["router"]["score"] == "softmax" and region["router"]["verified"]
        assert region["activation"] == "silu" and region["form"] == "grouped_mm"
        assert "/tests/" in region["source"] or "/transformers/" in region["source"]
        assert seen.parts["kind"] == "alltoall" and seen.parts["world_size"] == 2
        assert seen.parts["dispatch"] == seen.parts["combine"]
        assert seen.parts["dispatch"] == "_c10d_functional.all_to_all_single.default"
        assert "argsort" in seen.parts["sort"]
        assert seen.parts["sent_counts"] and "wait_tensor" in seen.parts["received_counts"]
        assert seen.parts["splits"] == [2, 2]
        assert {size[0] for size in seen.parts["tables"]} == {4}


@pytest.mark.parametrize("name", [n for n, p in PROGRAMS.items() if p.kind == "allreduce"])
def test_an_all_reduce_program_is_recognised(ranks2: RankPool, name: str) -> None:
    for seen in ranks2.run(look, name):
        assert seen.untouched and seen.error <= EXACT and not seen.declined
        (region,) = seen.regions
        assert region["program"] == "exchanged" and region["router"]["verified"]
        assert seen.parts["kind"] == "allreduce"
        assert seen.parts["dispatch"] == "_c10d_functional.all_reduce.default"
        assert {size[0] for size in seen.parts["tables"]} == {4}


@pytest.mark.parametrize("name", ["two_layers", "two_shared_layers"])
def test_every_layer_is_found_with_its_own_exchanges(ranks2: RankPool, name: str) -> None:
    for seen in ranks2.run(look, name, True):
        assert seen.untouched and not seen.declined
        first, second = seen.regions
        assert second["input"] == first["output"] != second["output"]
        assert first["router"]["verified"] and second["router"]["verified"]


REFUSED = {
    "unsorted": "not put in order by a sort",
    "never_summed": "never summed to one per token",
    "two_sources": "expected rows of one token tensor",
    "too_many_experts": "expected 4 of this rank",
}


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_declines(ranks2: RankPool, name: str, reason: str) -> None:
    for seen in ranks2.run(look, name):
        assert seen.untouched and not seen.regions
        (declined,) = seen.declined
        assert reason in declined["reason"] and declined["nearest_form"] == "exchanged"


def test_tensor_parallel_experts_are_no_exchange(ranks2: RankPool) -> None:
    """Every rank holds a slice of every expert: the sum over ranks is not one over experts."""
    for seen in ranks2.run(look, "tensor_parallel"):
        assert seen.untouched and not seen.regions
        assert all(d["nearest_form"] != "exchanged" for d in seen.declined)


def test_transformers_own_all_to_all_breaks_the_graph(ranks2: RankPool) -> None:
    """It asks whether any rows arrived, so that no graph holds both exchanges."""
    for report in ranks2.run(explain_broken):
        assert not any(region["program"] == "exchanged" for region in report["regions"])
        assert report["graphs"] > 1


def explain_broken(rank: int) -> dict[str, Any]:
    from tests.exchanged import transformers_block

    x = torch.randn(1, 11, 64, generator=torch.Generator().manual_seed(rank))
    with torch.no_grad():
        return moe_fx.explain(transformers_block("all_to_all", rank), x).to_dict()
