"""Layers that are computed again in backward (``torch.utils.checkpoint``), on real ranks."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from moe_fx.testing import RankError, RankPool
from tests.e2e.checkpointing import layers, slope, train
from tests.models import build

EXACT = 1e-5


def check_trained(ranks: RankPool, program: str, reentrant: bool, base: str, **given: Any) -> None:
    timeout = 900.0 if base == "inductor" else 120.0
    step = partial(train, program=program, base=base, **given)
    all_saved = ranks.run(partial(step, reentrant=None), timeout=timeout)
    for kept, again in zip(
        all_saved, ranks.run(partial(step, reentrant=reentrant), timeout=timeout), strict=True
    ):
        print(f"{base}, {program}: {kept.saved} B saved; with checkpoints {again.saved} B")
        assert again.error <= EXACT
        assert {k: v for k, v in again.gradient_errors.items() if v > EXACT} == {}
        assert again.saved < kept.saved / 2
        forward, backward = again.sent
        assert (forward, 2 * forward) == (kept.sent[0], backward)
        assert kept.sent[1] == forward > 0
        regions = again.report["regions"]
        assert [region["verified"] for region in regions] == [True, True]
        assert all("modeling_qwen3_moe.py:" in region["source"] for region in regions)
        assert again.report["declined"] == []


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_of_a_sharded_model(ranks2: RankPool, reentrant: bool) -> None:
    check_trained(ranks2, "gathered", reentrant, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize(("program", "base"), [("gathered", "eager"), ("replicated", "aot_eager")])
def test_gradient_checkpointing_of_other_programs(
    ranks2: RankPool, program: str, base: str
) -> None:
    check_trained(ranks2, program, False, base)


def test_gradient_checkpointing_of_a_model_loaded_by_shards(
    ranks2: RankPool, tmp_path: Path
) -> None:
    build("qwen3_moe")[0].save_pretrained(tmp_path)
    check_trained(ranks2, "loaded", True, "aot_eager", folder=str(tmp_path))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_under_inductor(ranks2: RankPool, reentrant: bool) -> None:
    check_trained(ranks2, "gathered", reentrant, "inductor")


def check(ranks: RankPool, *args: Any, **given: Any) -> list[Any]:
    steps = ranks.run(partial(layers, **given), *args)
    for step in steps:
        assert max(step.errors) <= EXACT
    return steps


@pytest.mark.parametrize("base", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "where",
    [
        "layer",
        "experts",
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("block", "router", "nested")),
    ],
)
def test_a_checkpoint_may_hold_any_part_of_the_layer(
    ranks2: RankPool, where: str, base: str
) -> None:
    for step in check(ranks2, where, base=base):
        (report,) = step.reports
        assert len(report["regions"]) == 2
        assert report["declined"] == []


def test_routing_is_kept_from_the_forward(ranks2: RankPool) -> None:
    """A tie in the router must not come out otherwise in backward."""
    for step in check(ranks2, "layer"):
        assert step.again["moe_fx.all_to_all"] == 8  # two layers, there and back, twice
        for name in ("aten.topk", "moe_fx.exchange_counts", "moe_fx.split_sizes"):
            assert name not in step.again


@pytest.mark.parametrize("base", ["eager", "aot_eager"])
@pytest.mark.parametrize("where", ["layer", "block"])
def test_the_models_own_choice_of_what_is_saved(ranks2: RankPool, where: str, base: str) -> None:
    for step in check(ranks2, where, base=base, selects=True):
        assert len(step.reports[0]["regions"]) == 2
        assert step.again["moe_fx.all_to_all"] == 8


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"overlap": 2}, {"strategy": "gather_weights"}])
def test_plans_are_carried_out_in_checkpoints(ranks2: RankPool, given: dict[str, Any]) -> None:
    check(ranks2, "layer", counts=((6, 9), (0, 5), (12, 1)), **given)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["padded_alltoall", "allgather"])
def test_even_exchanges_in_checkpoints(ranks2: RankPool, strategy: str) -> None:
    check(ranks2, "layer", counts=((6, 6),), strategy=strategy)


def test_layers_on_one_device(ranks2: RankPool) -> None:
    for step in check(ranks2, "layer", gathered=False):
        assert [r["program"] for r in step.reports[0]["regions"]] == ["local", "local"]


@pytest.mark.parametrize("backend", ["moe_fx", "aot_eager"])
def test_a_table_that_is_read_for_each_expert(ranks2: RankPool, backend: str) -> None:
    for step in check(ranks2, "layer", "reads often", backend=backend):
        gathers = step.again.get("_c10d_functional.all_gather_into_tensor", 0)
        assert gathers == 0 if backend == "moe_fx" else gathers > 0


def test_what_is_not_recognised_runs_right_and_says_why(ranks2: RankPool) -> None:
    for step in check(ranks2, "layer", "unknown", strict=False):
        (report,) = step.reports
        assert report["regions"] == []
        assert ["weighted sum" in d["reason"] for d in report["declined"]] == [True, True]
        assert all("ranks.py:" in d["source"] for d in report["declined"])
    with pytest.raises(RankError, match="MoE layers may be missed: the result is not the weighted"):
        ranks2.run(partial(layers, strict=True), "layer", "unknown")


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("where", ["layer", "experts"])
def test_uncompiled_a_rank_without_tokens_gathers_again_too(
    ranks2: RankPool, where: str, reentrant: bool
) -> None:
    """It meets no expert, and saves nothing of them."""
    counts = ((6, 9), (0, 5), (3, 0))
    for step in check(ranks2, where, "eager", backend="", reentrant=reentrant, counts=counts):
        assert step.again["_c10d_functional.all_gather_into_tensor"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("where", ["layer", "nested"])
def test_other_compilers_gather_again(ranks2: RankPool, where: str) -> None:
    for step in check(ranks2, where, backend="aot_eager"):
        assert step.again["_c10d_functional.all_gather_into_tensor"] == 4


@pytest.mark.parametrize("reentrant", [False, True])
def test_compiled_layers_in_checkpoints_that_are_not(ranks2: RankPool, reentrant: bool) -> None:
    for step in check(ranks2, "", around=True, reentrant=reentrant):
        assert step.reports
        assert all(len(report["regions"]) == 1 for report in step.reports)
        assert all(plan["strategy"] == "alltoall" for r in step.reports for plan in r["plans"])


@pytest.mark.parametrize("base", ["eager", "aot_eager"])
def test_dropout_is_drawn_again_as_it_was(ranks2: RankPool, base: str) -> None:
    for by_gradients, by_differences, regions in ranks2.run(slope, base):
        assert by_gradients == pytest.approx(by_differences, rel=1e-2, abs=1e-2)
        assert regions == 2
