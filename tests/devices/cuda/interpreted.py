"""Recorded launches made again on the CPU: Triton's interpreter in place of compiled kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moe_fx.devices.cuda import backward, launch, recording


@dataclass
class _Compiled:
    """Stands in for a compiled kernel: is launched with addresses."""

    kernel: Any
    first: Sequence[Any]
    options: dict[str, Any]
    function: None = None
    packed_metadata: tuple[()] = ()

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        given = [_at(*each) for each in zip(rest[6:], self.first, strict=True)]
        named = dict(zip(self.kernel.arg_names, given, strict=True))
        self.kernel[(x, y, z)](**named, **self.options)


def _at(given: Any, like: Any) -> Any:
    """A tensor as ``like`` at an address. Each has a storage of its own, as the interpreter takes
    those of one address for one."""
    if isinstance(given, TensorDescriptor):
        base = _at(given.base.data_ptr(), like.base)
        return TensorDescriptor(base, given.shape, given.strides, given.block_shape)
    if not isinstance(like, Tensor):
        return given
    reach = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True))
    memory = (ctypes.c_char * (reach * like.itemsize)).from_address(given)
    return torch.frombuffer(memory, dtype=like.dtype).as_strided(like.shape, like.stride())


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    kernel[grid](*args, **constants)
    now = launch._recording()
    if now is not None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | constants
        first = [named[name] for name in kernel.arg_names]
        options = {name: each for name, each in named.items() if name not in kernel.arg_names}
        compiled: Any = _Compiled(kernel, first, options)
        now.steps.append(recording.Launched(compiled, grid, first))


@contextmanager
def recorded_here() -> Iterator[None]:
    """Calls are recorded, and torch's grouped matmul taken, on the CPU too."""
    from moe_fx.devices.cuda.kernels import gate, gemm, grad, peers, rows, sort

    driver = mock.Mock(active=mock.Mock(get_current_stream=lambda _: 0))
    with (
        mock.patch.object(launch, "RECORDED_ON", ("cpu",)),
        mock.patch.object(recording, "driver", driver),
        mock.patch.object(grad, "launch", _launch),
        mock.patch.object(gate, "launch", _launch),
        mock.patch.object(gemm, "launch", _launch),
        mock.patch.object(peers, "launch", _launch),
        mock.patch.object(rows, "launch", _launch),
        mock.patch.object(sort, "launch", _launch),
        mock.patch.object(backward, "can_group", _even),
    ):
        yield


def _even(*operands: Tensor) -> bool:
    return all(size * each.itemsize % 16 == 0 for each in operands for size in each.shape[1:])
