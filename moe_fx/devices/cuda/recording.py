"""What a call did on a GPU, made again for other tensors of the same shapes.

A recording (`launch`) is a list of launches and of calls of torch's kernels, with the tensors that
they got. `kind_of` says for each of those where a later call finds its own: at so many bytes of an
input, of a buffer or of what a call returned. Small buffers are one allocation; the others, and
results of calls, are allocated when they are first used and freed when they were last. All of it is
then one function (`replay`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_fx.compat import autocast_off, empty_on
from moe_fx.devices.cuda.replay import Code, Function

__all__ = ["Called", "FromElsewhere", "Kind", "Launched", "Recording", "kind_of"]

_ALIGNED = 256
_PACKED = 1 << 20
"""Bytes of a buffer, from which on it is allocated by itself, for as long as it is used."""
_MOST_ADDRESSES = 256
"""Of which a launch keeps descriptors."""


class FromElsewhere(Exception):
    """A tensor of which it is not known where a later call finds its own."""


@dataclass
class Launched:
    compiled: Any
    grid: tuple[int, ...]
    args: Sequence[Any]


@dataclass
class Called:
    function: Callable[..., Tensor]
    args: Sequence[Any]
    named: dict[str, Any]
    result: Tensor


@dataclass
class Recording:
    """All tensors are kept, so that no two of them have the same address. stays: later calls do the
    same."""

    buffers: list[Tensor] = field(default_factory=list)
    steps: list[Launched | Called] = field(default_factory=list)
    stays: bool = True


@dataclass(frozen=True)
class _View:
    """What begins ``offset`` bytes into a slot's tensor. shape, strides: of it; None: it is the
    slot's tensor itself."""

    slot: int
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...] | None
    strides: tuple[int, ...]

    def written(self, code: Code) -> str:
        tensor = f"t{self.slot}"
        return tensor if self.shape is None else f"{code.constant(self._of)}({tensor})"

    def _of(self, tensor: Tensor) -> Tensor:
        assert self.shape is not None
        if tensor.dtype != self.dtype:
            tensor = tensor.view(self.dtype)
        skip = tensor.storage_offset() + self.offset // self.dtype.itemsize
        return tensor.as_strided(self.shape, self.strides, skip)


@dataclass(frozen=True)
class _Base:
    """Stands in for a tensor in a descriptor, of which launchers ask no more than this. (A tensor
    would keep its memory.)"""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True)
class _Described:
    """A descriptor of what begins ``offset`` bytes into a slot's tensor. made: by address, as to
    make and check one takes the host longer than a launch."""

    slot: int
    offset: int
    dtype: torch.dtype
    shape: list[int]
    strides: list[int]
    block: list[int]
    made: dict[int, TensorDescriptor] = field(default_factory=dict)

    def written(self, code: Code) -> str:
        return f"{code.constant(self._at)}({code.address(self.slot, self.offset)})"

    def _at(self, address: int) -> TensorDescriptor:
        made = self.made.get(address)
        if made is None:
            if len(self.made) >= _MOST_ADDRESSES:
                self.made.clear()
            made = TensorDescriptor(
                _Base(address, self.dtype), self.shape, self.strides, self.block
            )
            self.made[address] = made
        return made


@dataclass(frozen=True)
class _Launch:
    """By Triton's launcher, which takes addresses for tensors."""

    compiled: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]

    def write(self, code: Code) -> None:
        given = []
        for each in self.arguments:
            if isinstance(each, _View):
                given.append(code.address(each.slot, each.offset))
            elif isinstance(each, _Described):
                given.append(each.written(code))
            else:
                given.append(code.constant(each))
        run, function, metadata = (
            code.constant(each)
            for each in (self.compiled.run, self.compiled.function, self.compiled.packed_metadata)
        )
        x, y, z = (*self.grid, 1, 1)[:3]
        head = f"{x}, {y}, {z}, stream, {function}, {metadata}, None, None, None"
        code.line(f"{run}({', '.join([head, *given])})")


@dataclass(frozen=True)
class _Call:
    """slot: of the result, None where it was there before."""

    function: Callable[..., Tensor]
    arguments: tuple[Any, ...]
    named: dict[str, Any]
    slot: int | None

    def write(self, code: Code) -> None:
        given = [
            each.written(code) if isinstance(each, _View) else code.constant(each)
            for each in self.arguments
        ]
        given += [f"{name}={code.constant(each)}" for name, each in self.named.items()]
        made = f"{code.constant(self.function)}({', '.join(given)})"
        if self.slot is None:
            code.line(made)
        else:
            code.becomes(self.slot, made)


@dataclass(frozen=True)
class _Allocate:
    slot: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def write(self, code: Code) -> None:
        given = map(code.constant, (self.shape, self.strides, self.dtype))
        code.becomes(self.slot, f"empty({', '.join(given)})")


@dataclass(frozen=True)
class _Free:
    slot: int

    def write(self, code: Code) -> None:
        code.line(f"t{self.slot} = None")


_Step = _Launch | _Call | _Allocate | _Free
_NoResult = tuple[tuple[int, ...], torch.dtype]


@dataclass(frozen=True)
class Kind:
    """What calls of one kind do, within ``context``. run: the steps, written out."""

    steps: tuple[_Step, ...]
    run: Function
    device: torch.device
    context: Callable[[], AbstractContextManager[object]] | None

    def again(self, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The results for ``inputs``. The current device must be theirs."""
        stream = driver.active.get_current_stream(self.device.index)
        if self.context is None:
            return self.run(inputs, empty_on(self.device), stream)
        with self.context():
            return self.run(inputs, empty_on(self.device), stream)


def kind_of(
    recording: Recording,
    inputs: Sequence[Tensor | None],
    results: Sequence[Tensor],
    device: torch.device,
) -> Kind:
    """What calls do of which one was recorded. Raises `FromElsewhere`."""
    return _Recorder(recording, inputs, results).kind(device)


class _Recorder:
    """Makes a `Kind` of a recording."""

    def __init__(
        self, recording: Recording, inputs: Sequence[Tensor | None], results: Sequence[Tensor]
    ) -> None:
        self.recording, self.inputs, self.results = recording, inputs, results
        self.steps: list[_Step] = []
        self.slots: list[Tensor | None] = list(inputs)
        self.places: dict[int, tuple[int, int]] = {}
        """By address of a storage: the slot, and the address that the slot's tensor begins at; of
        packed buffers, what makes the difference to it the offset."""
        for slot, tensor in enumerate(inputs):
            if tensor is not None and tensor.numel():
                storage = tensor.untyped_storage().data_ptr()
                if storage in self.places:
                    raise FromElsewhere
                self.places[storage] = slot, tensor.data_ptr()

    def kind(self, device: torch.device) -> Kind:
        self._place_buffers()
        for step in self.recording.steps:
            if isinstance(step, Launched):
                arguments = [self._argument(each) for each in step.args]
                self.steps.append(_Launch(step.compiled, step.grid, tuple(arguments)))
            else:
                self._add_call(step)
        results = tuple(
            self._view(each) if each.numel() else (tuple(each.shape), each.dtype)
            for each in self.results
        )
        kept = {each.slot for each in results if isinstance(each, _View)}
        steps = _freed(self.steps, range(len(self.inputs), len(self.slots)), kept)
        calls = any(isinstance(step, _Call) for step in steps)
        run = _written(len(self.inputs), steps, results, device)
        return Kind(tuple(steps), run, device, autocast_off if calls else None)

    def _new_slot(self, tensor: Tensor) -> int:
        self.slots.append(tensor)
        self.places[tensor.untyped_storage().data_ptr()] = len(self.slots) - 1, tensor.data_ptr()
        return len(self.slots) - 1

    def _place_buffers(self) -> None:
        """Gives each buffer a slot of its own, or a place in the slot of all small ones."""
        seen = [*self.results]
        for step in self.recording.steps:
            if isinstance(step, Called):
                seen.extend(each for each in step.args if isinstance(each, Tensor))
        alone = {each.untyped_storage().data_ptr() for each in seen}
        packed, size = len(self.slots), 0
        self.slots.append(None)
        for buffer in self.recording.buffers:
            storage = buffer.untyped_storage().data_ptr()
            if storage in alone or buffer.nbytes >= _PACKED:
                slot = self._new_slot(buffer)
                shape, strides = tuple(buffer.shape), buffer.stride()
                self.steps.append(_Allocate(slot, shape, strides, buffer.dtype))
            else:
                self.places[storage] = packed, buffer.data_ptr() - size
                size += -(-buffer.nbytes // _ALIGNED) * _ALIGNED
        if size:
            self.steps.insert(0, _Allocate(packed, (size,), (1,), torch.uint8))

    def _add_call(self, step: Called) -> None:
        arguments = tuple(self._argument(each) for each in step.args)
        known = step.result.untyped_storage().data_ptr() in self.places
        slot = None if known else self._new_slot(step.result)
        self.steps.append(_Call(step.function, arguments, step.named, slot))

    def _argument(self, given: Any) -> Any:
        if isinstance(given, Tensor):
            return self._view(given)
        if isinstance(given, TensorDescriptor):
            view = self._view(given.base)
            return _Described(
                view.slot,
                view.offset,
                view.dtype,
                list(given.shape),
                list(given.strides),
                list(given.block_shape),
            )
        return given

    def _view(self, tensor: Tensor) -> _View:
        found = self.places.get(tensor.untyped_storage().data_ptr())
        if found is None:
            raise FromElsewhere
        slot, begin = found
        offset, strides = tensor.data_ptr() - begin, tensor.stride()
        whole = self.slots[slot]
        if whole is not None and not offset and _alike(whole, tensor):
            return _View(slot, 0, tensor.dtype, None, strides)
        return _View(slot, offset, tensor.dtype, tuple(tensor.shape), strides)


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def _written(
    inputs: int,
    steps: Sequence[_Step],
    results: Sequence[_View | _NoResult],
    device: torch.device,
) -> Function:
    """results: where they are found at the end, or shape and dtype of one that holds nothing."""
    code = Code(inputs)
    for step in steps:
        step.write(code)
    found = []
    for each in results:
        if isinstance(each, _View):
            found.append(each.written(code))
        else:
            empty = functools.partial(torch.empty, each[0], dtype=each[1], device=device)
            found.append(f"{code.constant(empty)}()")
    return code.function(found)


def _used(step: _Step) -> set[int]:
    """Slots that a step reads or writes."""
    if isinstance(step, _Launch):
        return {each.slot for each in step.arguments if isinstance(each, _View | _Described)}
    if isinstance(step, _Call):
        return {each.slot for each in step.arguments if isinstance(each, _View)} | (
            set() if step.slot is None else {step.slot}
        )
    return {step.slot}


def _freed(steps: Sequence[_Step], made: range, kept: set[int]) -> list[_Step]:
    """Every buffer allocated just before its first use, and freed just behind its last."""
    allocations = {step.slot: step for step in steps if isinstance(step, _Allocate)}
    order: list[_Step] = []
    last = {slot: at for at, step in enumerate(steps) for slot in _used(step)}
    for at, step in enumerate(steps):
        if isinstance(step, _Allocate):
            continue
        used = sorted(_used(step))
        order.extend(allocations.pop(slot) for slot in used if slot in allocations)
        order.append(step)
        order.extend(
            _Free(slot) for slot in used if slot in made and slot not in kept and last[slot] == at
        )
    return [*allocations.values(), *order]
