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

from moe_fx.devices.cuda import choice
from moe_fx.devices.cuda.choice import GROUPED, Way, candidates, default, way
from moe_fx.devices.cuda.kernels.gemm import Tiles
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
    layout=st.sampled_from(["halves", "single"]),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    k_last=st.just((True, True)),
    described=st.booleans(),
    grouped=st.booleans(),
    shared_memory=st.sampled_from([49152, 101376, 166912, 232448]),
)


@given(shape=shapes, tokens=st.integers(1, 100_000))
def test_a_layer_always_has_kernels_that_its_gpu_takes(shape: Shape, tokens: int) -> None:
    size = getattr(torch, shape.dtype).itemsize
    for found, matrices in zip(
        candidates(shape, tokens), (2 if shape.gated else 1, 1), strict=True
    ):
        tiles = [each for each in found if isinstance(each, Tiles)]
        assert tiles
        assert GROUPED not in found or shape.grouped
        for each in tiles:
            assert shape.described or not each.described
            held = (each.rows + matrices * each.columns) * each.depth * size * each.stages
            assert held <= shape.shared_memory


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A GPU without one: times are what the test says."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(choice, "_chosen", {})
    return tmp_path


def measured(monkeypatch: pytest.MonkeyPatch, shape: Shape, best: Way) -> tuple[Way, list[Way]]:
    """What is chosen if these are the fastest, and all that ran."""
    ran: list[Way] = []
    monkeypatch.setattr(choice, "_seconds", lambda run: run())

    def activations(each: Way) -> Any:
        ran.append(each)
        return 1.0 if each.gate_up == best.gate_up else 2.0

    def result(each: Way, _h: Any) -> Any:
        ran.append(each)
        return 1.0 if each.down == best.down else 2.0

    found, stays = way(shape, 4000, GPU, activations, result)
    assert stays
    return found, ran


def test_the_fastest_is_taken_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ups, downs = candidates(HOPPER, 4000)
    best = Way(ups[1], downs[-1])
    found, ran = measured(monkeypatch, HOPPER, best)
    assert found == best
    assert {each.gate_up for each in ran} == set(ups)
    assert {each.down for each in ran} >= set(downs)

    monkeypatch.setattr(choice, "_chosen", {})  # another process
    found, ran = measured(monkeypatch, HOPPER, best)
    assert found == best
    assert ran == []
    _, ran = measured(monkeypatch, AMPERE, best)  # another layer
    assert ran


def test_a_file_that_cannot_be_read_is_said_and_measured_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    best = default(HOPPER, 4000)
    measured(monkeypatch, HOPPER, best)
    (file,) = cache.glob("moe_fx/cuda/*.json")
    file.write_text("{")
    monkeypatch.setattr(choice, "_chosen", {})
    with caplog.at_level(logging.WARNING, "moe_fx"):
        _, ran = measured(monkeypatch, HOPPER, best)
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

    found, stays = way(HOPPER, 4000, GPU, never, never)
    assert found == default(HOPPER, 4000)
    assert stays == (why != "capture")  # a later call, outside of a capture, measures
    assert not list(cache.rglob("*.json"))
