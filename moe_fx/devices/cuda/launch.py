"""Launches, recorded once and made again without Triton's own bookkeeping.

A layer of few tokens takes the GPU less time than Triton takes the host to look at every argument
of five launches. What a call launches, with which grids and numbers, follows from the shapes and
strides of its tensors. So the first call of a kind is recorded (`recorded`), and later ones pass
the addresses of their tensors to the same compiled kernels. All buffers in between are one
allocation.

The key of a kind must say all that Triton specialises on: shapes, strides, dtypes, and whether
addresses are multiples of 16 (`key_of`). A call that does something else (torch's own kernels,
views of two inputs of one storage) is not recorded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

__all__ = ["Kind", "empty", "key_of", "known", "launch", "not_recorded", "on", "recorded"]

_MOST = 1024
"""Kinds of calls that are kept."""
_ALIGNED = 256
_active = threading.local()


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A buffer for kernels, not filled."""
    buffer = torch.empty(tuple(shape), dtype=dtype, device=device)
    recording = getattr(_active, "recording", None)
    if recording is not None:
        recording.buffers.append(buffer)
    return buffer


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """``kernel[grid](*args, **constants)``."""
    compiled = kernel[grid](*args, **constants)
    recording = getattr(_active, "recording", None)
    if recording is not None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants
        ordered = [named[name] for name in kernel.arg_names]
        recording.launches.append((compiled, grid, ordered))


def not_recorded() -> None:
    """What is launched now cannot be launched again by its addresses alone."""
    recording = getattr(_active, "recording", None)
    if recording is not None:
        recording.whole = False


@dataclass
class _Recording:
    whole: bool = True
    buffers: list[Tensor] = field(default_factory=list)
    launches: list[tuple[Any, tuple[int, ...], list[Any]]] = field(default_factory=list)


@dataclass(frozen=True)
class _Address:
    """``offset`` bytes into a tensor: an input, a result, or the buffers in between."""

    tensor: int
    offset: int


@dataclass(frozen=True)
class _Described:
    """A descriptor of what stands at an address."""

    address: _Address
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]

    def of(self, tensors: Sequence[Tensor | None]) -> TensorDescriptor:
        tensor = tensors[self.address.tensor]
        assert tensor is not None
        if tensor.dtype != self.dtype:
            tensor = tensor.view(self.dtype)
        skip = tensor.storage_offset() + self.address.offset // self.dtype.itemsize
        viewed = tensor.as_strided(self.shape, self.strides, skip)
        return TensorDescriptor(viewed, list(self.shape), list(self.strides), list(self.block))


@dataclass(frozen=True)
class _Launch:
    """run, head: Triton's launcher, and what it takes before the kernel's arguments but for the
    stream. arguments: those, with None where ``addresses`` and ``described`` come in."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    function: Any
    metadata: Any
    arguments: tuple[Any, ...]
    addresses: tuple[tuple[int, int, int], ...]
    described: tuple[tuple[int, _Described], ...]

    @classmethod
    def of(cls, compiled: Any, grid: tuple[int, ...], arguments: Sequence[Any]) -> _Launch:
        return cls(
            compiled.run,
            (*grid, 1, 1)[:3],  # type: ignore[arg-type]
            compiled.function,
            compiled.packed_metadata,
            tuple(None if isinstance(a, _Address | _Described) else a for a in arguments),
            tuple((at, *astuple(a)) for at, a in enumerate(arguments) if isinstance(a, _Address)),
            tuple((at, a) for at, a in enumerate(arguments) if isinstance(a, _Described)),
        )

    def again(self, stream: int, begins: list[int], tensors: Sequence[Tensor | None]) -> None:
        arguments = list(self.arguments)
        for at, tensor, offset in self.addresses:
            arguments[at] = begins[tensor] + offset
        for at, described in self.described:
            arguments[at] = described.of(tensors)
        head = (*self.grid, stream, self.function, self.metadata, None, None, None)
        self.run(*head, *arguments)


@dataclass(frozen=True)
class Kind:
    """What calls of one kind launch. between: bytes of the buffers in between; results: shapes and
    dtypes."""

    between: int
    results: tuple[tuple[tuple[int, ...], torch.dtype], ...]
    launches: tuple[_Launch, ...]
    device: torch.device

    def again(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The results for ``inputs``. The current device must be theirs."""
        device = self.device
        results = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.results]
        tensors = [*inputs, *results]
        if self.between:
            tensors.append(torch.empty(self.between, dtype=torch.uint8, device=device))
        begins = [0 if each is None else each.data_ptr() for each in tensors]
        stream = triton.runtime.driver.active.get_current_stream(device.index)
        for each in self.launches:
            each.again(stream, begins, tensors)
        return tuple(results)


_kinds: dict[Hashable, Kind | None] = {}
"""None: calls of this kind cannot be recorded."""


def key_of(inputs: Sequence[Tensor | None]) -> tuple[Hashable, ...]:
    """What a kernel is compiled for, of its tensors."""
    return tuple(
        [
            None
            if each is None
            else (each.shape, each.stride(), each.dtype, each.data_ptr() % 16 == 0, each.device)
            for each in inputs
        ]
    )


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
    if device.type != "cuda" or key in _kinds:
        return run()
    outer, _active.recording = getattr(_active, "recording", None), _Recording()
    try:
        results = run()
        recording: _Recording = _active.recording
    finally:
        _active.recording = outer
    if len(_kinds) >= _MOST:
        _kinds.clear()
    _kinds[key] = _kind(recording, inputs, results, device)
    return results


def _kind(
    recording: _Recording,
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor],
    device: torch.device,
) -> Kind | None:
    places = _places(recording, inputs, results)
    if not recording.whole or places is None:
        return None
    between = 0
    for buffer in recording.buffers:
        if not any(buffer is each for each in results):
            between += -(-buffer.nbytes // _ALIGNED) * _ALIGNED
    launches = []
    for compiled, grid, args in recording.launches:
        made = [_recorded_argument(each, places) for each in args]
        if any(each is NotImplemented for each in made):
            return None
        launches.append(_Launch.of(compiled, grid, made))
    shapes = tuple((tuple(each.shape), each.dtype) for each in results)
    return Kind(between, shapes, tuple(launches), device)


Places = Mapping[int, tuple[_Address, int]]
"""By address of a storage: where it is found again, and the address that the tensor begins at."""


def _places(
    recording: _Recording, inputs: Sequence[Tensor | None], results: Sequence[Tensor]
) -> Places | None:
    """None: two inputs share a storage, or a result is no buffer of its own."""
    places: dict[int, tuple[_Address, int]] = {}
    for at, tensor in enumerate((*inputs, *results)):
        if tensor is None or not tensor.numel():
            continue
        storage = tensor.untyped_storage().data_ptr()
        if storage in places:
            return None
        places[storage] = _Address(at, 0), tensor.data_ptr()
    last, offset = len(inputs) + len(results), 0
    for buffer in recording.buffers:
        if any(buffer is each for each in results):
            continue
        places[buffer.untyped_storage().data_ptr()] = _Address(last, offset), buffer.data_ptr()
        offset += -(-buffer.nbytes // _ALIGNED) * _ALIGNED
    return places


def _recorded_argument(given: Any, places: Places) -> Any:
    """NotImplemented: it is a tensor that comes from elsewhere."""
    if isinstance(given, Tensor):
        return _address(given, places)
    if isinstance(given, TensorDescriptor):
        address = _address(given.base, places)
        if address is NotImplemented:
            return address
        return _Described(
            address,
            given.base.dtype,
            tuple(given.shape),
            tuple(given.strides),
            tuple(given.block_shape),
        )
    return given


def _address(tensor: Tensor, places: Places) -> Any:
    found = places.get(tensor.untyped_storage().data_ptr())
    if found is None:
        return NotImplemented
    (place, begin) = found
    return _Address(place.tensor, place.offset + tensor.data_ptr() - begin)


@contextmanager
def on(tensor: Tensor) -> Iterator[None]:
    """Triton launches on the current device."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        with torch.cuda.device(tensor.device):
            yield
    else:
        yield
