"""Which kernel a matmul of a layer runs on, for so many tokens: by measurement, once, kept on disk.

A matmul is measured the first time that a layer of its shape runs with about so many tokens (a
power of two and all below it, down to the next), in the few ways that are worth a try there. What
was fastest is kept in a file per GPU, and the file's name says all that it depends on, so that
other releases and other kernels measure again.

Nothing is measured under capture of a CUDA graph, nor with ``MOE_FX_TUNE=0``: then the first of the
ways is taken, mostly the fastest, and nothing is kept.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
import triton
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from moe_fx.devices.cuda.kernels.tiles import Tiles
from moe_fx.devices.cuda.launch import not_recorded, paused
from moe_fx.devices.cuda.layer import Shape
from moe_fx.sources import SOURCES

__all__ = ["BACK", "GRAD", "GROUPED", "Way", "backward_ways", "choose", "forward_ways"]

log = logging.getLogger("moe_fx")

GROUPED = "grouped_mm"
"""torch's grouped matmul on gathered rows."""
_SECONDS = 0.1
"""For all ways to run one matmul, about, once they are compiled."""
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 25

Way = Tiles | str
"""The tiles of our kernel, or `GROUPED`."""

_chosen: dict[tuple[int, str, Shape, int], Way] = {}
_lock = threading.Lock()


def choose(
    matmul: str,
    shape: Shape,
    tokens: int,
    device: torch.device,
    ways: Sequence[Way],
    run: Callable[[Way], Any],
) -> Way:
    """The way to run ``matmul`` of a layer of that shape. run: it, in some way."""
    if device.type != "cuda" or len(ways) == 1:
        return ways[0]
    bucket = triton.next_power_of_2(tokens)
    key = (device.index, matmul, shape, bucket)
    found = _chosen.get(key)
    if found is not None and found in ways:
        return found
    if os.environ.get("MOE_FX_TUNE") == "0":
        return ways[0]
    if torch.cuda.is_current_stream_capturing():
        not_recorded()
        return ways[0]
    with _lock, paused():
        if _chosen.get(key) not in ways:
            name = _name(matmul, shape, bucket)
            kept = _kept(device, name)
            if kept is None or kept not in ways:
                kept = _measured(name, device, ways, run)
            _chosen[key] = kept
        return _chosen[key]


def _measured(
    name: str, device: torch.device, ways: Sequence[Way], run: Callable[[Way], Any]
) -> Way:
    began = time.perf_counter()
    best = _fastest(ways, run) or ways[0]
    log.info("measured %s in %.1f s: %s", name, time.perf_counter() - began, best)
    _keep(device, name, best)
    return best


def _fastest(ways: Sequence[Way], run: Callable[[Way], Any]) -> Way | None:
    """By the median of rounds in which each runs once. None: none of them can run here."""
    taken: dict[Way, list[float]] = {}
    for each in ways:
        try:
            run(each)  # compiles
        except (OutOfResources, CompilationError) as reason:
            log.debug("%s: %s", each, reason)
        else:
            taken[each] = []
    spent = 0.0
    for at in range(_MOST_ROUNDS):
        if at >= _LEAST_ROUNDS and spent > _SECONDS:
            break
        for each, times in taken.items():
            times.append(_seconds(lambda each=each: run(each)))  # type: ignore[misc]
            spent += times[-1]
    return min(taken, key=lambda each: statistics.median(taken[each])) if taken else None


def _seconds(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return 1e-3 * start.elapsed_time(end)


def forward_ways(shape: Shape, tokens: int) -> tuple[list[Way], list[Way]]:
    """For gate and up, and for down."""
    per_expert = tokens * shape.top_k / shape.experts
    ups, downs = next(both for most, *both in _TILES if per_expert <= most)
    grouped: list[Way] = [GROUPED] if shape.grouped and per_expert > _FEW_ROWS else []
    together = grouped
    if shape.alternates:  # other kernels fetch every second element, twice
        ups = sorted(ups, key=lambda tiles: not tiles.joined)
        together = [GROUPED] if shape.grouped else []
    return (
        [*_fitting(ups, shape, 2 if shape.gated else 1, shape.hidden), *together],
        [*_fitting(downs, shape, 1, shape.inner), *grouped],
    )


def backward_ways(
    tiles: Sequence[Tiles], shape: Shape, grouped: bool, described: bool
) -> list[Way]:
    """For a matmul of backward: of `BACK` or `GRAD`. grouped, described: torch's grouped matmul and
    descriptors take its operands."""
    size = getattr(torch, shape.dtype).itemsize
    ways: list[Way] = [GROUPED] if grouped else []
    if described:
        ways += [each for each in tiles if _shared_memory(each, 1, size) <= shape.shared_memory]
    return ways or [_BACK_SMALL]


_FEW_ROWS = 96
"""Of an expert, up to which torch's grouped matmul was never the fastest (H200)."""
_SMALL = Tiles(32, 32, 32, 8, 4, 2)
"""Takes any layer."""
_TILES: list[tuple[float, list[Tiles], list[Tiles]]] = [
    (
        8,
        [
            Tiles(16, 64, 256, 1, 4, 3),
            Tiles(16, 128, 128, 1, 4, 3),
            Tiles(16, 32, 256, 1, 4, 3),
            Tiles(16, 64, 128, 1, 2, 4),
            Tiles(16, 64, 64, 1, 4, 5),
            Tiles(16, 64, 64, 1, 4, 4, described=True, joined=True),
            Tiles(16, 32, 64, 1, 4, 5, described=True, joined=True),
            Tiles(16, 64, 64, 1, 4, 4, joined=True),
            Tiles(16, 32, 128, 1, 4, 3, joined=True),
        ],
        [
            Tiles(16, 64, 128, 1, 2, 4),
            Tiles(16, 128, 128, 1, 4, 3),
            Tiles(16, 64, 256, 1, 4, 2),
            Tiles(16, 64, 64, 1, 4, 5),
        ],
    ),
    (
        32,
        [
            Tiles(32, 64, 128, 1, 4, 3),
            Tiles(32, 128, 128, 1, 4, 3),
            Tiles(64, 128, 64, 1, 4, 4),
            Tiles(32, 128, 64, 1, 4, 5),
            Tiles(16, 128, 128, 1, 4, 3),
            Tiles(32, 64, 64, 1, 4, 4, described=True, joined=True),
            Tiles(64, 64, 64, 8, 4, 4, described=True, joined=True),
            Tiles(32, 64, 64, 1, 4, 4, joined=True),
        ],
        [
            Tiles(32, 128, 128, 1, 4, 3),
            Tiles(32, 64, 128, 1, 4, 3),
            Tiles(64, 128, 64, 1, 4, 4),
            Tiles(32, 128, 64, 1, 4, 5),
        ],
    ),
    (
        96,
        [
            Tiles(128, 128, 64, 1, 8, 4, described=True),
            Tiles(64, 128, 64, 8, 4, 4, described=True, joined=True),
            Tiles(128, 128, 64, 8, 8, 3, described=True, joined=True, rest=64),
            Tiles(128, 128, 64, 8, 8, 4),
            Tiles(64, 128, 64, 8, 4, 4, described=True),
            Tiles(64, 64, 64, 1, 4, 4),
        ],
        [
            Tiles(128, 128, 64, 8, 4, 3, described=True),
            Tiles(128, 128, 64, 8, 4, 3, described=True, rest=64),
            Tiles(128, 256, 64, 8, 8, 4, described=True),
            Tiles(64, 128, 64, 8, 4, 4, described=True),
            Tiles(64, 128, 64, 1, 4, 4),
        ],
    ),
    (
        float("inf"),
        [
            Tiles(128, 128, 64, 8, 8, 4, described=True, gathered=True, joined=True),
            Tiles(128, 128, 64, 16, 8, 3, described=True, gathered=True, joined=True),
            Tiles(128, 128, 64, 8, 8, 3, described=True, joined=True),
            Tiles(128, 128, 64, 8, 8, 3, described=True, joined=True, rest=64),
            Tiles(128, 128, 64, 8, 8, 3, described=True, gathered=True, joined=True, rest=64),
            Tiles(128, 128, 64, 1, 8, 4, described=True),
            Tiles(128, 128, 64, 8, 8, 3, described=True, gathered=True),
            Tiles(128, 128, 64, 8, 8, 3),
        ],
        [
            Tiles(128, 256, 64, 8, 8, 4, described=True),
            Tiles(128, 256, 64, 8, 8, 4, described=True, rest=64),
            Tiles(128, 128, 64, 8, 4, 3, described=True),
            Tiles(128, 128, 64, 8, 4, 3, described=True, rest=64),
            Tiles(128, 128, 64, 8, 8, 3, described=True),
            Tiles(256, 128, 64, 8, 8, 3, described=True),
            Tiles(128, 128, 64, 8, 8, 3),
        ],
    ),
]
"""For up to so many rows of an expert: ways for gate and up, and for down, as measured on an H200
for the shapes of Qwen3-30B-A3B, Mixtral 8x7B and an eighth of DeepSeek-V3."""

_BACK_SMALL = Tiles(64, 64, 32, 4, 4, 3)
"""Takes any operands, in backward."""
BACK = [
    Tiles(128, 256, 64, 8, 8, 4, described=True),
    Tiles(128, 256, 64, 8, 8, 4, described=True, rest=64),
    Tiles(128, 128, 64, 8, 4, 3, described=True),
    Tiles(128, 128, 64, 8, 4, 3, described=True, rest=64),
    Tiles(64, 128, 64, 8, 4, 4, described=True),
]
"""For the gradients of rows."""
GRAD = [
    Tiles(128, 256, 64, 8, 8, 3, described=True),
    Tiles(128, 128, 64, 8, 8, 4, described=True),
    Tiles(128, 128, 64, 8, 4, 3, described=True),
    Tiles(256, 128, 64, 8, 8, 3, described=True),
]
"""For the gradients of tables: rows and columns of one, and rows that are summed at once."""


def _fitting(tiles: list[Tiles], shape: Shape, matrices: int, depth: int) -> list[Way]:
    """Those that the layer and the GPU take, `_SMALL` if there are none."""
    size = getattr(torch, shape.dtype).itemsize
    found: list[Way] = [
        each
        for each in tiles
        if _takes(shape, each, matrices)
        and (depth % each.depth == 0 or each.depth <= _PADDED)
        and _shared_memory(each, matrices, size) <= shape.shared_memory
    ]
    return found or [_SMALL]


def _takes(shape: Shape, tiles: Tiles, matrices: int) -> bool:
    if tiles.joined:
        return shape.joinable if tiles.described else shape.alternates
    described = shape.described and not (matrices == 2 and shape.alternates)
    return described or not tiles.described


_PADDED = 64
"""The deepest tile of which a part may be empty."""


def _shared_memory(tiles: Tiles, matrices: int, size: int) -> int:
    """Bytes in flight: of rows, and of so many matrices."""
    return (tiles.rows + matrices * tiles.columns) * tiles.depth * size * tiles.stages


def _file(device: torch.device) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    name = torch.cuda.get_device_name(device).replace(" ", "-")
    versions = f"torch-{torch.__version__}-triton-{triton.__version__}-{SOURCES[:12]}"
    return cache / "moe_fx" / "cuda" / f"{name}-{versions}.json"


def _name(matmul: str, shape: Shape, bucket: int) -> str:
    of = " ".join(f"{key}={value}" for key, value in {**asdict(shape), "tokens": bucket}.items())
    return f"{matmul} {of}"


def _kept(device: torch.device, name: str) -> Way | None:
    found = _read(_file(device)).get(name)
    return found if found is None or isinstance(found, str) else Tiles(*found)


def _read(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): kernels are measured again", file, error)
        return {}
    return read if isinstance(read, dict) else {}


def _keep(device: torch.device, name: str, chosen: Way) -> None:
    file = _file(device)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = _read(file) | {name: chosen if isinstance(chosen, str) else astuple(chosen)}
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as written:
            json.dump(content, written, indent=1)
        os.replace(written.name, file)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next process measures again", file, error)
