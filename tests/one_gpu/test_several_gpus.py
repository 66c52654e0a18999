"""``moe-fx bench --device cuda`` under torchrun, over Gloo on hosts in place of GPUs: what is
compared, what is wrong, the table, the command."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from typer.testing import CliRunner

from moe_fx.bench.layers import LAYERS, MODELS
from moe_fx.bench.machine import Host
from moe_fx.bench.ranks import measure, programs
from moe_fx.bench.ranks.points import RankPoint, show
from moe_fx.bench.ranks.run import failures, run
from moe_fx.testing import RankPool
from moe_fx_cli import app
from tests.one_gpu.test_one_gpu import QWEN3

FEW = ["compute", "exchange", "chunks1", "direct"]
ALL = list(programs.PROGRAMS)


def table_of(point: RankPoint) -> str:
    text = io.StringIO()
    show([point], "2 × card", Console(file=text, width=250))
    return text.getvalue()


def bench(
    rank: int, path: str, names: list[str], routing: list[str], training: bool = False
) -> tuple[list[RankPoint], str]:
    text = io.StringIO()
    with mock.patch.dict(LAYERS, {"tiny": QWEN3}):
        points = run(
            Host(),
            Console(file=text, width=250),
            Path(path),
            layers=["tiny"],
            tokens=[12],
            routing=routing,
            programs=names,
            rounds=2,
            training=training,
            base="aot_eager",
            trace=Path(path).with_suffix(".trace.json"),
        )
    return points, text.getvalue()


@pytest.mark.parametrize(
    ("names", "routing"),
    [(FEW, ["uniform"]), pytest.param(ALL, ["uniform", "zipf"], marks=pytest.mark.slow)],
)
def test_programs_are_right_and_timed(
    ranks2: RankPool, tmp_path: Path, names: list[str], routing: list[str]
) -> None:
    path = tmp_path / "figures.json"
    (points, table), (_, other) = ranks2.run(bench, str(path), names, routing)
    assert other == ""
    for point in points:
        assert point.failed == {}
        assert set(point.samples) == {*names, "direct_graph"}
        assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in point.samples.values())
        assert set(point.errors) == {*names, "direct_graph"} - {"exchange"}
        assert point.plans["direct"].startswith("direct, 2 ranks of 4 experts")
        assert point.title in table
    traced = json.loads(path.with_suffix(".trace.json").read_text())["traceEvents"]
    assert {*points[0].samples} <= {each.get("name") for each in traced}
    written = json.loads(path.read_text())
    assert [each["routing"] for each in written["points"]] == routing
    assert written["points"][0]["medians"].keys() == points[0].samples.keys()


def decoded(rank: int, names: list[str]) -> list[RankPoint]:
    with mock.patch.dict(MODELS, {"tiny": QWEN3}):
        return run(
            Host(),
            Console(file=io.StringIO()),
            models=["tiny"],
            tokens=[2],
            programs=names,
            rounds=2,
            base="aot_eager",
        )


@pytest.mark.parametrize("names", [FEW, pytest.param(ALL, marks=pytest.mark.slow)])
def test_steps_of_decode_are_right_and_timed(ranks2: RankPool, names: list[str]) -> None:
    for (point,) in ranks2.run(decoded, names):
        assert point.failed == {}
        assert set(point.samples) == {*names, "direct_graph"} - {"exchange"}
        assert max(point.errors.values()) < 2e-2
        assert point.plans["direct"].startswith("direct, 2 ranks of 4 experts")
        assert "decode, batch 2 a rank" in point.title


def test_gradients_of_tokens_are_compared(ranks2: RankPool, tmp_path: Path) -> None:
    names = ["exchange", "direct"]
    path = str(tmp_path / "figures.json")
    ((point,), _), _ = ranks2.run(bench, path, names, ["uniform"], True)
    assert point.failed == {}
    assert set(point.samples) == set(names)


def wrong(rank: int) -> RankPoint:
    """One rank of a program that gives another result."""

    def make(*args: Any) -> programs.Program:
        made = programs.make(*args)
        return programs.Program(lambda given: made.call(given) + 0.1 * rank)

    return measured_with(make)


def measured_with(make: Any) -> RankPoint:
    point = RankPoint("tiny", 12, "uniform", False, 2)
    with mock.patch.object(measure, "make", make):
        measure.measure(QWEN3, point, ["compute"], Host(), 1, "eager", lambda _: None)
    return point


def fails(rank: int) -> RankPoint:
    """One rank of a program that cannot run; the other does not wait for it."""

    def make(*args: Any) -> programs.Program:
        if rank:
            raise programs.CannotRun("not here")
        return programs.make(*args)

    return measured_with(make)


def test_what_fails_on_one_rank_fails_on_all(ranks2: RankPool) -> None:
    for point in ranks2.run(fails):
        assert point.failed == {"compute": "not here"} and point.samples == {}


def ours_left_alone(rank: int) -> RankPoint:
    """A program of ours that made no graph."""
    return measured_with(lambda *args: programs.Program(programs.make(*args).call, []))


def test_a_layer_that_was_not_rewritten_is_not_timed(ranks2: RankPool) -> None:
    for point in ranks2.run(ours_left_alone):
        assert "did not rewrite the layer" in point.failed["compute"]


def test_a_wrong_result_of_any_rank_is_seen_on_all(ranks2: RankPool) -> None:
    for point in ranks2.run(wrong):
        assert "wrong" in point.failed["compute"]
        assert failures([point])
        assert "wrong" in table_of(point)


def shares(rank: int, routing: str) -> list[float]:
    machine = Host()
    block = measure._block(QWEN3, machine, training=False)
    given = measure._tokens(block, 2000, routing, machine)
    counts = torch.bincount(block.selected(given).flatten(), minlength=8)
    dist.all_reduce(counts)
    return sorted((counts / counts.sum()).tolist())


def test_zipf_is_skewed(ranks2: RankPool) -> None:
    uniform, zipf = (ranks2.run(shares, routing)[0] for routing in ("uniform", "zipf"))
    assert zipf[-1] > 1.5 * uniform[-1]


def test_figures_of_a_point() -> None:
    point = RankPoint("qwen3", 64, "uniform", False, 2)
    point.samples = {"hf_compiled": [3e-3, 4e-3, 9e-3], "direct": [1e-3], "direct_graph": [5e-4]}
    assert point.faster("direct") == pytest.approx(4.0)
    table = table_of(point)
    assert "1000 (4.00)" in table and "500 (8.00)" in table and "exchange" not in table


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cuda:1"], "each rank takes a GPU of its own"),
        (["--device", "cuda", "--quick"], "is about the slow link"),
        (["--device", "cuda", "--parts"], "is for one GPU"),
        (["--device", "cuda", "--model", "qwen3", "--training"], "is for layers"),
    ],
)
def test_options_that_are_not_for_several_gpus(options: list[str], said: str) -> None:
    result = CliRunner().invoke(app, ["bench", *options], env={"WORLD_SIZE": "2"})
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
