"""The benchmark of overlap: its arithmetic, its network's refusals, its trace, its command."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

import moe_fx_cli
import moe_fx_cli.bench
from moe_fx.errors import MoeFxError
from moe_fx.testing import RankPool
from tests.bench import layers, netlab, overlap, ranks, results, timeline, variants
from tests.bench.exchanges import Recording, Watched, watch


def point(**samples: list[float]) -> results.Point:
    return results.Point("qwen3", "uniform", False, 1.0, 150.0, 512, samples=samples)


MEASURED: dict[str, list[float]] = {
    "compute": [0.5, 0.4, 0.6],
    "exchange1": [0.8],
    "exchange8": [0.4],
    "off": [1.3],
    "hf_eager": [1.5],
    "chunks1": [1.3],
    "chunks2": [0.9],
    "chunks4": [0.7],
    "chunks8": [0.72],
    "auto": [0.714],
}


def test_figures_of_a_point() -> None:
    found = point(**MEASURED)
    assert found.exchange == (0.4, 8)
    assert found.bound == 0.5
    assert found.measured_ratio == pytest.approx(0.8)
    assert found.over_bound("chunks4") == pytest.approx(1.4)
    assert found.hidden("chunks4") == pytest.approx(0.75)
    assert found.hidden("off") == 0.0
    assert found.ours == "auto"
    assert found.speedup("hf_eager") == pytest.approx(1.5 / 0.714)
    few = point(**{name: value for name, value in MEASURED.items() if name != "chunks1"})
    assert few.from_best is None  # of those that were asked for it may be none


def test_auto_is_compared_with_what_it_did_not_decide_for_round_by_round() -> None:
    fixed = {name: [1.0, 2.0, 4.0] for name in ("chunks1", "chunks2", "off")}
    found = point(**fixed, chunks4=[0.8, 1.0, 4.4], chunks8=[0.7, 1.8, 2.4], auto=[0.9, 1.8, 8.0])
    found.chosen["auto"] = "chunks8"
    # its rounds are 0.8, 1.8, 5.2: 1.0, 1.8 and 1.18 times those of four chunks
    assert found.from_best == pytest.approx(5.2 / 4.4 - 1)
    found.chosen["auto"] = "chunks16"  # not among the fixed: by itself, and 8 are another choice
    assert found.from_best == pytest.approx(1.8 - 1)
    text = io.StringIO()
    results.show(found, Console(file=text, width=250))
    assert "ours, auto: chunks16 (+80.0% from the best other)" in text.getvalue()


def test_without_auto_ours_is_the_best_chunk_count() -> None:
    found = point(**{name: value for name, value in MEASURED.items() if name != "auto"})
    assert found.ours == "chunks4"
    assert found.from_best is None


def test_what_was_not_measured_has_no_figures() -> None:
    found = point(off=[1.0])
    assert (found.bound, found.ours, found.hidden("off"), found.speedup("hf_eager")) == (None,) * 4
    json.dumps(found.to_dict())


def test_nothing_is_hidden_where_there_is_nothing_to_hide() -> None:
    assert point(compute=[1.0], exchange1=[0.1], off=[1.0], chunks2=[0.9]).hidden("chunks2") is None


def test_table_shows_why_a_program_was_not_timed(tmp_path: Path) -> None:
    found = point(**MEASURED)
    found.failed["inductor"] = "no [triton]"
    text = io.StringIO()
    console = Console(file=text, width=150)
    results.show(found, console)
    results.summarise([found], console)
    assert "not timed: Inductor's scheduler: no [triton]" in text.getvalue()
    assert "75%" in text.getvalue()
    results.write_json([found], tmp_path / "r.json")
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["machine"]["torch"] == torch.__version__
    assert written["points"][0]["hidden"]["chunks4"] == pytest.approx(0.75)


def test_failures_are_those_of_our_programs() -> None:
    found = point(**MEASURED)
    found.failed |= {"inductor": "wrong"}
    assert overlap.failures([found]) == []
    found.failed |= {"auto": "wrong"}
    assert len(overlap.failures([found])) == 1


# ---- The layers


@pytest.mark.parametrize("name", layers.LAYERS)
def test_routing_is_as_asked_for(name: str) -> None:
    layer = layers.LAYERS[name]
    block = layers.build(layer, 64, "uniform")
    busiest = {}
    for routing in ("uniform", "zipf"):
        with torch.no_grad():
            block.get_parameter("gate.weight").copy_(layers.gate(layer, routing))
        ids = layers.selection(block, layers.tokens(layer, 0, routing))
        found = layers.shares(ids, layer.num_experts)
        assert sum(found) == pytest.approx(1.0)
        busiest[routing] = max(found) * layer.num_experts
    assert busiest["uniform"] < 1.15
    assert busiest["zipf"] > 2.0


def test_routing_unknown() -> None:
    with pytest.raises(ValueError, match="expected 'uniform' or 'zipf'"):
        layers.gate(layers.LAYERS["qwen3"], "even")


def test_width_for_a_ratio() -> None:
    assert layers.width_for(exchange=0.5, fixed=0.1, per_width=1e-3, ratio=1.0) == 384
    assert layers.width_for(exchange=0.01, fixed=0.1, per_width=1e-3, ratio=1.0) == 64


def test_pieces_add_up() -> None:
    pieces = ranks._cut([7, 0, 16], 4)
    assert [sum(column) for column in zip(*pieces, strict=True)] == [7, 0, 16]


# ---- The network


def test_network_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: f"/sbin/{tool}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    text = io.StringIO()
    assert overlap.run(overlap.select(quick=True), Console(file=text, width=200)) is None
    assert "skipped: the two-host network needs root" in text.getvalue()


def test_network_needs_its_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda tool: None if tool == "tc" else f"/sbin/{tool}")
    with pytest.raises(netlab.Unavailable, match="needs tc, not found here: install iproute2"):
        netlab.require()


def test_network_is_taken_down_if_it_cannot_be_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(*command: str, check: bool = True) -> None:
        ran.append(" ".join(command))
        if "tbf" in command:
            raise netlab.Unavailable("the kernel lacks it")

    monkeypatch.setattr(netlab, "require", lambda: None)
    monkeypatch.setattr(netlab, "_run", run)
    with pytest.raises(netlab.Unavailable), netlab.Network():
        pass
    made = [command.split()[-1] for command in ran if "netns add" in command]
    gone = [command.split()[-1] for command in ran if "netns del" in command]
    assert made and made == gone[::-1]


def test_two_networks_share_no_name() -> None:
    first, second = netlab.Network(), netlab.Network()
    assert first.interface(0) != second.interface(0)
    assert len(first.interface(0)) <= 15  # Linux's limit


# ---- Exchanges, played back and watched


def exchanges_of_a_step(rank: int) -> tuple[bool, bool, Watched]:
    def step() -> Tensor:
        counts, rows = torch.empty(2), torch.empty(4, 3)
        dist.all_to_all_single(counts, torch.tensor([1.0, 2.0]) + rank)
        work = dist.all_to_all_single(rows, torch.full((4, 3), float(rank)), async_op=True)
        work.wait()
        return rows + counts.sum()

    recording = Recording()
    with recording.record():
        expected = step()
    before = dist.all_to_all_single
    with recording.replay():
        replayed = step()
    try:
        with recording.replay():
            pass
        noticed = False
    except RuntimeError:
        noticed = True
    assert dist.all_to_all_single is before
    return torch.equal(replayed, expected), noticed, watch(step)


def test_exchanges_are_played_back_and_watched(ranks2: RankPool) -> None:
    for equal, noticed, seen in ranks2.run(exchanges_of_a_step):
        assert equal and noticed
        assert [size for *_, size in seen.exchanges] == [8, 48]
        assert len(seen.waits) == 2
        assert all(seen.start <= start <= end for start, end, _ in seen.exchanges)


# ---- The trace


def watched(start: float) -> Watched:
    exchanges = [(start + 0.1, start + 0.5, 100), (start + 0.2, start + 0.6, 100)]
    return Watched(start, start + 1.0, exchanges, [(start + 0.3, start + 0.4)])


def test_what_is_no_wait_is_compute() -> None:
    assert timeline.complement([(2, 3), (0, 1), (2.5, 4)], (0, 5)) == [(1, 2), (4, 5)]
    assert timeline.complement([], (0, 5)) == [(0, 5)]


def test_trace_is_valid(tmp_path: Path) -> None:
    runs = [timeline.Run(title, [watched(7.0), watched(7.1)]) for title in ("before", "after")]
    timeline.write_trace(runs, tmp_path / "t.json")
    events: list[dict[str, Any]] = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    named = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert set(named.values()) == {f"{t}: rank {r}" for t in ("before", "after") for r in (0, 1)}
    lanes: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] > 0
            lane = lanes.setdefault((event["pid"], event["tid"]), [])
            lane.append((event["ts"], event["ts"] + event["dur"]))
    for lane in lanes.values():  # what overlaps on one lane, viewers do not show
        lane.sort()
        assert all(b[0] >= a[1] - 1e-3 for a, b in itertools.pairwise(lane))
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == {
        *("compute", "wait", "exchange 1", "exchange 2")
    }


def test_picture_is_valid(tmp_path: Path) -> None:
    runs = [timeline.Run("a < b", [watched(7.0), watched(7.1)])]
    timeline.write_svg(runs, tmp_path / "t.svg", "title & more")
    text = (tmp_path / "t.svg").read_text()
    root = ET.fromstring(text)
    width = float(root.attrib["viewBox"].split()[2])
    boxes = [e.attrib for e in root.iter() if e.attrib.get("class") in ("compute", "wait")]
    assert boxes and all(float(b["x"]) + float(b["width"]) <= width for b in boxes)
    assert "prefers-color-scheme: dark" in text


# ---- The command


def run_command(*arguments: str) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": "200"}).invoke(moe_fx_cli.app, ["bench", *arguments])
    return result.exit_code, " ".join(result.output.split())


def test_help_teaches() -> None:
    code, output = run_command("--help")
    assert code == 0
    assert "bound: the longer of compute and exchange" in output
    assert "Exit status: 0; 1 if a program of moe_fx failed" in output
    for option in ("--layer", "--ratio", "--routing", "--backward", "--rounds", "--quick"):
        assert option in output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--layer", "llama"), "--layer llama: give qwen3, mixtral, deepseek"),
        (("--routing", "even"), "--routing even: give uniform, zipf"),
        (("--program", "best"), "--program best: give compute, off"),
        (("--ratio", "9"), "give ratios of exchange to compute in 0.1 to 4"),
    ],
)
def test_options_that_cannot_be_used(arguments: tuple[str, ...], said: str) -> None:
    code, output = run_command(*arguments)
    assert code == 2
    assert said in output


def test_selection() -> None:
    quick = overlap.select(quick=True)
    assert (quick.num_points, quick.rounds) == (1, 3)
    everything = overlap.select()
    assert (everything.num_points, everything.rounds) == (3 * 4 * 2 * 2, 7)
    assert everything.programs == tuple(variants.TITLES)
    assert overlap.select(programs=["auto"]).programs == ("compute", "off", "auto")
    some = overlap.select(["mixtral"], quick=True, backward=True, rounds=1)
    assert (some.layers, some.backward, some.rounds) == (["mixtral"], (True,), 1)


def test_it_says_beforehand_how_long_it_will_take() -> None:
    quick = overlap.announcement(overlap.select(quick=True))
    assert quick.startswith("1 point, ")
    assert re.search(r"3 rounds: about [2-9] minutes; on a busy machine, twice that", quick)
    everything = overlap.announcement(overlap.select())
    assert re.search(r"^48 points, .*7 rounds: about [2-9]\.\d hours", everything)


def test_a_machine_that_cannot_have_the_network_is_skipped_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(**_: object) -> None:
        raise netlab.Unavailable("needs root [sudo]")

    monkeypatch.setattr(overlap, "Network", refuse)
    assert run_command("--quick") == (0, "skipped: needs root [sudo]")


def test_without_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(moe_fx_cli.bench, "__file__", str(tmp_path / "moe_fx_cli" / "bench.py"))
    with pytest.raises(MoeFxError, match=r"Clone the project, `pip install -e '\.\[hf\]'`"):
        moe_fx_cli.bench._from_checkout("tests.bench.overlap")


def test_the_checkout_is_found_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(moe_fx_cli.__file__).resolve().parents[2])
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", root)])
    assert moe_fx_cli.bench._from_checkout("tests.bench.overlap") is overlap
    assert root in sys.path


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quick_run_from_end_to_end(tmp_path: Path) -> None:
    try:
        with netlab.Network():
            pass
    except netlab.Unavailable as reason:
        pytest.skip(str(reason))
    written = (str(tmp_path / "r.json"), str(tmp_path / "t.json"))
    code, output = run_command(
        *("--quick", "--rounds", "1", "--json", written[0], "--trace", written[1])
    )
    assert code == 0, output
    (found,) = json.loads(Path(written[0]).read_text())["points"]
    assert found["bound"] > 0
    for name in ("compute", "off", "hf_eager", "hf_compiled", "inductor"):
        assert found["errors"][name] <= results.AGREEMENT
        assert found["medians"][name] > 0
    assert Path(written[1]).exists()
    assert Path(written[1]).with_suffix(".svg").exists()
