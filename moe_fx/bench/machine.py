"""Where programs are timed: a GPU, or the host in its place for tests of what measures."""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any, Protocol, TypeVar

import torch

from moe_fx.errors import ConfigurationError

T = TypeVar("T")
Call = Callable[[], Any]
Function = Callable[..., Any]

_WARM_UP = 3
_ROUND_SECONDS = 0.01
_MOST_CALLS = 50
_LEAST_ROUNDS = 5


class Machine(Protocol):
    """device: where tensors are made. name: of the card. cache_bytes: of its last cache.
    matmul_size, copy_bytes: of what its peaks are measured with."""

    device: torch.device
    name: str
    cache_bytes: int
    matmul_size: int
    copy_bytes: int

    def samples(self, call: Call, count: int, cold: bool = False) -> list[float]:
        """Seconds of each of ``count`` calls in a row, which the host does not wait between.
        cold: the cache is overwritten before each, outside of what is timed."""
        ...

    def captured(self, call: Callable[[], T]) -> tuple[Call, T]:
        """(replay, result): what ``call`` launches, to be launched again at once; every replay
        writes the same tensors of ``result``."""
        ...

    def free_bytes(self) -> int:
        """Memory of the device that nothing holds."""
        ...

    def clear(self) -> None:
        """Give back what is no longer in use."""
        ...


class Gpu:
    """A CUDA device, timed by its events, with graphs captured by ``torch.cuda.graph``."""

    matmul_size = 8192
    copy_bytes = 2**31

    def __init__(self, device: str) -> None:
        """Raises `ConfigurationError` saying what to do if torch has no such device."""
        wanted = device
        if not torch.cuda.is_available():
            raise ConfigurationError(
                f"--device {wanted}: torch {torch.__version__} sees no CUDA GPU here. Run this "
                "on a machine that has one: nvidia-smi must list it, and torch must be a build for "
                "CUDA (https://pytorch.org/get-started/locally)."
            )
        self.device = torch.device("cuda", torch.device(device).index or 0)
        if self.device.index >= torch.cuda.device_count():
            raise ConfigurationError(
                f"--device {wanted}: there are {torch.cuda.device_count()} GPUs, from cuda:0 on."
            )
        torch.cuda.set_device(self.device)
        found = torch.cuda.get_device_properties(self.device)
        self.name = found.name
        self.cache_bytes = int(found.L2_cache_size)
        self._flushed = torch.empty(2 * self.cache_bytes, dtype=torch.uint8, device=self.device)

    def samples(self, call: Call, count: int, cold: bool = False) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        torch.cuda.synchronize(self.device)
        for start, end in events:
            if cold:
                self._flushed.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def captured(self, call: Callable[[], T]) -> tuple[Call, T]:
        aside = torch.cuda.Stream(self.device)
        aside.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UP):
                call()
        torch.cuda.current_stream(self.device).wait_stream(aside)
        torch.cuda.synchronize(self.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = call()
        return graph.replay, result

    def free_bytes(self) -> int:
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return torch.cuda.mem_get_info(self.device)[0] + held

    def clear(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()


@dataclass
class Host:
    """The CPU, for tests: a "graph" runs the call again and copies into the tensors of the first
    result."""

    device = torch.device("cpu")
    name: str = platform.processor() or "CPU"
    cache_bytes: int = 1 << 20
    matmul_size: int = 128
    copy_bytes: int = 1 << 20

    def samples(self, call: Call, count: int, cold: bool = False) -> list[float]:
        found = []
        for _ in range(count):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found

    def captured(self, call: Callable[[], T]) -> tuple[Call, T]:
        result = call()

        def replay() -> None:
            before, again = (torch.utils._pytree.tree_leaves(each) for each in (result, call()))
            for held, new in zip(before, again, strict=True):
                if isinstance(held, torch.Tensor):
                    held.copy_(new)

        return replay, result

    def free_bytes(self) -> int:
        return 1 << 40

    def clear(self) -> None:
        gc.collect()


def interleaved(
    calls: dict[str, Call], machine: Machine, seconds: float, cold: bool = False
) -> dict[str, list[float]]:
    """Seconds of each call, the median of each round.

    In a round each runs several times in a row (`_ROUND_SECONDS`), one after the other, in turn
    forwards and backwards, so that a drift of the card's clock meets all alike. Rounds end after
    ``seconds``, but there are at least `_LEAST_ROUNDS`.
    """
    counts = {}
    for name, call in calls.items():
        machine.samples(call, _WARM_UP)
        once = median(machine.samples(call, _WARM_UP))
        counts[name] = min(_MOST_CALLS, max(1, round(_ROUND_SECONDS / max(once, 1e-9))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    begin, rounds = time.perf_counter(), 0
    while rounds < _LEAST_ROUNDS or time.perf_counter() - begin < seconds:
        for name in list(calls)[:: -1 if rounds % 2 else 1]:
            found[name].append(median(machine.samples(calls[name], counts[name], cold)))
        rounds += 1
    return found
