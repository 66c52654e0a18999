"""Which kernel a layer's matmuls run on, for so many tokens: by measurement, once, kept on disk.

A layer of a shape is measured the first time that it runs with about so many tokens (a power of two
and all below it, down to the next): gate and up first, then down, each in the few ways that are
worth a try there. What was fastest is kept in a file per GPU, and the file's name says all that it
depends on, so that other releases and other kernels measure again.

Nothing is measured under capture of a CUDA graph, nor with ``MOE_FX_TUNE=0``: then `default`
answers, and nothing is kept.
"""

from __future__ import annotations

import json
import logging
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from moe_fx.devices.cuda.kernels.gemm import Tiles
from moe_fx.devices.cuda.layer import Shape
from moe_fx.sources import SOURCES

__all__ = ["GROUPED", "Way", "candidates", "default", "way"]

log = logging.getLogger("moe_fx")

GROUPED = "grouped_mm"
"""torch's grouped matmul on gathered rows."""
_SECONDS = 0.1
"""For all ways to run one matmul, about, once they are compiled."""
_LEAST_ROUNDS, _MOST_ROUNDS = 5, 25


@dataclass(frozen=True)
class Way:
    """`GROUPED`, or the tiles of the kernel."""

    gate_up: Tiles | str
    down: Tiles | str


_chosen: dict[tuple[int, Shape, int], Way] = {}
_lock = threading.Lock()


def way(
    shape: Shape,
    tokens: int,
    device: torch.device,
    activations: Callable[[Way], Tensor],
    result: Callable[[Way, Tensor], Tensor],
) -> tuple[Way, bool]:
    """The way to run this call, and whether others like it are run so too. activations, result: run
    the halves of the layer in some way."""
    if device.type != "cuda":
        return default(shape, tokens), True
    bucket = triton.next_power_of_2(tokens)
    key = (device.index, shape, bucket)
    found = _chosen.get(key)
    if found is not None:
        return found, True
    if os.environ.get("MOE_FX_TUNE") == "0":
        return default(shape, tokens), True
    if torch.cuda.is_current_stream_capturing():
        return default(shape, tokens), False
    with _lock:
        if key not in _chosen:
            _chosen[key] = _kept(device, shape, bucket) or _measured(
                shape, tokens, bucket, device, activations, result
            )
        return _chosen[key], True


def _measured(
    shape: Shape,
    tokens: int,
    bucket: int,
    device: torch.device,
    activations: Callable[[Way], Tensor],
    result: Callable[[Way, Tensor], Tensor],
) -> Way:
    began = time.perf_counter()
    best = default(shape, tokens)
    ups, downs = candidates(shape, tokens)
    up = _fastest(ups, lambda each: activations(Way(each, best.down)))
    best = Way(up or best.gate_up, best.down)
    h = activations(best)
    down = _fastest(downs, lambda each: result(Way(best.gate_up, each), h))
    best = Way(best.gate_up, down or best.down)
    log.info(
        "measured experts %dx%d, %d of %d, up to %d tokens, in %.1f s: %s",
        *(shape.hidden, shape.inner, shape.top_k, shape.experts, bucket),
        time.perf_counter() - began,
        best,
    )
    _keep(device, shape, bucket, best)
    return best


def _fastest(ways: list[Tiles | str], run: Callable[[Tiles | str], Any]) -> Tiles | str | None:
    """By the median of rounds in which each runs once. None: none of them can run here."""
    taken: dict[Tiles | str, list[float]] = {}
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


def default(shape: Shape, tokens: int) -> Way:
    """Where nothing was measured: the first of the candidates."""
    ups, downs = candidates(shape, tokens)
    return Way(ups[0], downs[0])


def candidates(shape: Shape, tokens: int) -> tuple[list[Tiles | str], list[Tiles | str]]:
    """Ways for gate and up, and for down, the one that was mostly the fastest first."""
    per_expert = tokens * shape.top_k / shape.experts
    ups, downs = next(both for most, *both in _TILES if per_expert <= most)
    grouped: list[Tiles | str] = [GROUPED] if shape.grouped and per_expert > _FEW_ROWS else []
    return (
        [*_fitting(ups, shape, 2 if shape.gated else 1, shape.hidden), *grouped],
        [*_fitting(downs, shape, 1, shape.inner), *grouped],
    )


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
            Tiles(128, 128, 64, 8, 8, 4),
            Tiles(64, 128, 64, 8, 4, 4, described=True),
            Tiles(64, 64, 64, 1, 4, 4),
        ],
        [
            Tiles(128, 128, 64, 8, 4, 3, described=True),
            Tiles(128, 256, 64, 8, 8, 4, described=True),
            Tiles(64, 128, 64, 8, 4, 4, described=True),
            Tiles(64, 128, 64, 1, 4, 4),
        ],
    ),
    (
        float("inf"),
        [
            Tiles(128, 128, 64, 1, 8, 4, described=True),
            Tiles(128, 128, 64, 8, 8, 3, described=True),
            Tiles(128, 128, 64, 16, 8, 3, described=True, gathered=True),
            Tiles(128, 128, 64, 8, 8, 4, described=True, gathered=True),
            Tiles(128, 128, 64, 8, 8, 3),
        ],
        [
            Tiles(128, 256, 64, 8, 8, 4, described=True),
            Tiles(128, 128, 64, 8, 4, 3, described=True),
            Tiles(128, 128, 64, 8, 8, 3, described=True),
            Tiles(256, 128, 64, 8, 8, 3, described=True),
            Tiles(128, 128, 64, 8, 8, 3),
        ],
    ),
]
"""For up to so many rows of an expert: ways for gate and up, and for down, as measured on an H200
for the shapes of Qwen3-30B-A3B, Mixtral 8x7B and an eighth of DeepSeek-V3."""


def _fitting(tiles: list[Tiles], shape: Shape, matrices: int, depth: int) -> list[Tiles | str]:
    """Those that the layer and the GPU take, `_SMALL` if there are none."""
    size = getattr(torch, shape.dtype).itemsize
    found: list[Tiles | str] = [
        each
        for each in tiles
        if (shape.described or not each.described)
        and (depth % each.depth == 0 or each.depth <= _PADDED)
        and _shared_memory(each, matrices, size) <= shape.shared_memory
    ]
    return found or [_SMALL]


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


def _name(shape: Shape, bucket: int) -> str:
    return " ".join(f"{key}={value}" for key, value in {**asdict(shape), "tokens": bucket}.items())


def _kept(device: torch.device, shape: Shape, bucket: int) -> Way | None:
    found = _read(_file(device)).get(_name(shape, bucket))
    if found is None:
        return None
    up, down = (each if isinstance(each, str) else Tiles(*each) for each in found)
    return Way(up, down)


def _read(file: Path) -> dict[str, Any]:
    try:
        read = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): kernels are measured again", file, error)
        return {}
    return read if isinstance(read, dict) else {}


def _keep(device: torch.device, shape: Shape, bucket: int, chosen: Way) -> None:
    file = _file(device)
    both = [
        each if isinstance(each, str) else astuple(each) for each in (chosen.gate_up, chosen.down)
    ]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        content = _read(file) | {_name(shape, bucket): both}
        with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False) as written:
            json.dump(content, written, indent=1)
        os.replace(written.name, file)
    except OSError as error:
        log.warning("%s cannot be written (%s): the next process measures again", file, error)
