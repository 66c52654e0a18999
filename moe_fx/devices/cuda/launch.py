"""Launches, recorded once and made again without Triton's own bookkeeping.

A layer of few tokens takes the GPU less time than Triton takes the host to look at every argument
of five launches, and so do the many short kernels of a backward. What a call launches, with which
grids and numbers, follows from the shapes and strides of its tensors. So the first call of a kind
is recorded (`recorded`), and later ones pass the addresses of their tensors to the same compiled
kernels. torch's own kernels in between (`call`) are called as they were, on the same views.

The key of a kind must say all that Triton specialises on: shapes, strides, dtypes, and whether
addresses are multiples of 16 (`key_of`). A call that does something else (views of two inputs of
one storage, a tensor that was neither given, nor made by `empty` or `call`) is not recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from moe_fx.devices.cuda.recording import Called, FromElsewhere, Kind, Launched, Recording, kind_of

__all__ = [
    *("call", "cast", "empty", "key_of", "known", "launch"),
    *("not_recorded", "on", "paused", "recorded"),
]

_MOST = 1024
"""Kinds of calls that are kept."""
RECORDED_ON = ("cuda",)
"""Types of devices."""
_active = threading.local()


def _recording() -> Recording | None:
    return getattr(_active, "recording", None)


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer for kernels, not filled."""
    buffer = torch.empty(tuple(shape), dtype=dtype, device=device)
    recording = _recording()
    if recording is not None:
        recording.buffers.append(buffer)
    return buffer


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``."""
    compiled = kernel[grid](*args, **constants)
    recording = _recording()
    if recording is not None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants
        ordered = [named[name] for name in kernel.arg_names]
        recording.steps.append(Launched(compiled, grid, ordered))


def call(function: Callable[..., Tensor], *args: Any, **named: Any) -> Tensor:
    """``function(*args, **named)``, of torch; tensors are among ``args``. What it returns is new,
    or the first of them, written in place."""
    result = function(*args, **named)
    recording = _recording()
    if recording is not None:
        recording.steps.append(Called(function, args, named, result))
    return result


def not_recorded() -> None:
    """What this call does, later ones may do otherwise."""
    recording = _recording()
    if recording is not None:
        recording.stays = False


@contextmanager
def paused() -> Iterator[None]:
    """What is launched and made here is none of the call that is recorded."""
    outer, _active.recording = _recording(), None
    try:
        yield
    finally:
        _active.recording = outer


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``."""
    return tensor if tensor.dtype == dtype else call(torch.Tensor.to, tensor, dtype)


_kinds: dict[Hashable, Kind | None] = {}
"""None: calls of this kind cannot be recorded."""


def key_of(inputs: Sequence[Tensor | None]) -> tuple[Hashable, ...]:
    """What a kernel is compiled for, of its tensors, the first of which says the device."""
    first = inputs[0]
    assert first is not None
    return first.device, *[
        None if each is None else (each.shape, each.stride(), each.dtype, each.data_ptr() % 16 == 0)
        for each in inputs
    ]


def known(key: Hashable) -> Kind | None:
    """What was recorded of calls with ``key``."""
    return _kinds.get(key)


def recorded(
    key: Hashable,
    inputs: Sequence[Tensor | None],
    device: torch.device,
    run: Callable[[], tuple[Tensor, ...]],
) -> tuple[Tensor, ...]:
    """``run()``, a call of which nothing is `known`, recorded if it can be."""
    if device.type not in RECORDED_ON or key in _kinds:
        return run()
    outer, _active.recording = _recording(), Recording()
    try:
        results = run()
        recording: Recording = _active.recording
    finally:
        _active.recording = outer
    if not recording.stays:
        return results
    if len(_kinds) >= _MOST:
        _kinds.clear()
    try:
        _kinds[key] = kind_of(recording, inputs, results, device)
    except FromElsewhere:
        _kinds[key] = None
    return results


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()
