"""Which kernels are tried, and that what was measured is kept."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton")

from moe_fx.devices.cuda import choice, launch
from moe_fx.devices.cuda.choice import BACK, GRAD, GROUPED, Way, backward_ways, choose, forward_ways
from moe_fx.devices.cuda.kernels.tiles import Tiles
from moe_fx.devices.cuda.layer import Shape

HOPPER = Shape(128, 8, 2048, 768, "halves", "bfloat16", (True, True), True, True, 232448)
AMPERE = replace(HOPPER, described=False, grouped=False, shared_memory=101376)
GPU = torch.device("cuda", 0)
shapes = st.builds(
    Shape,
    experts=st.integers(1, 512),
    top_k=st.integers(1, 8),
    hidden=st.integers(1, 8192),
    inner=st.integers(1, 8192),
    layout=st.sampled_from(["halves", "interleaved", "separate", "single"]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    k_last=st.tuples(st.booleans(), st.booleans()),
    described=st.booleans(),
    grouped=st.booleans(),
    shared_memory=st.sampled_from([49152, 101376, 166912, 232448]),
)


@given(shape=shapes, tokens=st.integers(1, 100_000))
def test_a_layer_always_has_kernels_that_its_gpu_takes(shape: Shape, tokens: int) -> None:
    size = getattr(torch, shape.dtype).itemsize
    for found, matrices in zip(
        forward_ways(shape, tokens), (2 if shape.gated else 1, 1), strict=True
    ):
        tiles = [each for each in found if isinstance(each, Tiles)]
        assert tiles
        assert GROUPED not in found or shape.grouped
        for each in tiles:
            assert shape.described or not each.described
            assert not each.joined or (shape.joinable if each.described else shape.alternates)
            held = (each.rows + matrices * each.columns) * each.depth * size * each.stages
            assert held <= shape.shared_memory


@pytest.mark.parametrize("tokens", [1, 64, 256, 4000])
def test_columns_that_alternate_in_memory_are_fetched_together(tokens: int) -> None:
    shape = replace(HOPPER, layout="interleaved", k_last=(False, False))
    first, *others = forward_ways(shape, tokens)[0]
    assert isinstance(first, Tiles)
    assert first.joined
    assert GROUPED in others


@given(shape=shapes, grouped=st.booleans(), described=st.booleans())
def test_a_gradient_always_has_kernels(shape: Shape, grouped: bool, described: bool) -> None:
    for tiles in (BACK, GRAD):
        found = backward_ways(tiles, shape, grouped, described)
        assert found
        assert (GROUPED in found) == grouped
        assert described or not any(each.described for each in found if isinstance(each, Tiles))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU without one: times are what the test says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(choice, "_chosen", {})
    return tmp_path


WAYS: list[Way] = [*forward_ways(HOPPER, 4000)[0]]


def measured(
    monkeypatch: pytest.MonkeyPatch, best: Way, shape: Shape = HOPPER, matmul: str = "gate_up"
) -> tuple[Way, list[Way]]:
    """What is chosen if that is the fastest, and all that ran."""
    ran: list[Way] = []
    monkeypatch.setattr(choice, "_seconds", lambda run: run())

    def run(way: Way) -> Any:
        ran.append(way)
        return 1.0 if way == best else 2.0

    return choose(matmul, shape, 4000, GPU, WAYS, run), ran


def test_the_fastest_is_taken_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for best in (WAYS[2], GROUPED):
        matmul = str(best)
        found, ran = measured(monkeypatch, best, matmul=matmul)
        assert found == best
        assert set(ran) == set(WAYS)
        monkeypatch.setattr(choice, "_chosen", {})  # another process
        found, ran = measured(monkeypatch, best, matmul=matmul)
        assert found == best
        assert ran == []
    _, ran = measured(monkeypatch, best, AMPERE)  # another layer
    assert ran


def test_what_is_measured_is_not_recorded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_seconds", lambda run: run())
    seen = []
    empty = torch.zeros(4)

    def run(way: Way) -> float:
        launch.call(torch.clone, empty)
        return 1.0

    def recorded() -> tuple[Any, ...]:
        choose("down", HOPPER, 4000, GPU, WAYS, run)
        seen.append(launch._recording())
        return (launch.call(torch.clone, empty),)

    monkeypatch.setattr(launch, "_kinds", {})
    launch.recorded("key", [empty], GPU, recorded)
    assert len(seen[0].steps) == 1


def test_a_file_that_cannot_be_read_is_said_and_measured_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    measured(monkeypatch, WAYS[0])
    (file,) = cache.glob("moe_fx/cuda/*.json")
    file.write_text("{")
    monkeypatch.setattr(choice, "_chosen", {})
    with caplog.at_level(logging.WARNING, "moe_fx"):
        _, ran = measured(monkeypatch, WAYS[0])
    assert ran
    assert str(file) in caplog.text


@pytest.mark.parametrize("why", ["MOE_FX_TUNE", "capture"])
def test_nothing_is_measured(cache: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    if why == "capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    else:
        monkeypatch.setenv("MOE_FX_TUNE", "0")

    def never(*_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(launch, "_kinds", {})
    x = torch.zeros(4)

    def call() -> tuple[Any, ...]:
        assert choose("gate_up", HOPPER, 4000, GPU, WAYS, never) == WAYS[0]
        return (launch.call(torch.clone, x),)

    launch.recorded("key", [x], GPU, call)
    assert ("key" in launch._kinds) == (why != "capture")  # a later call measures
    assert not list(cache.rglob("*.json"))
