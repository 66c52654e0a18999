"""Launches made again: the addresses are those of the later call's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_fx.devices.cuda import launch
from moe_fx.devices.cuda.launch import empty, key_of, known, not_recorded, recorded

GPU = torch.device("cuda", 0)


class Kernel:
    """As Triton's; notes with what it was launched, by Triton and again."""

    arg_names = ("x", "out", "n", "BLOCK")

    def __init__(self) -> None:
        self.first: list[Any] = []
        self.again: list[Any] = []

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **constants: Any) -> Any:
            self.first.append((grid, args, constants))
            return mock.Mock(run=self._again, function=7, packed_metadata=())

        return run

    def _again(self, x: int, y: int, z: int, *rest: Any) -> None:
        stream, function, _metadata, _data, _enter, _exit, *args = rest
        assert (stream, function) == (5, 7)
        self.again.append(((x, y, z), args))


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buffers on the host in place of a GPU's."""
    real = torch.empty
    monkeypatch.setattr(launch, "_kinds", {})
    driver = mock.Mock(active=mock.Mock(get_current_stream=lambda _: 5))
    monkeypatch.setattr(launch.triton.runtime, "driver", driver)
    with mock.patch.object(
        launch.torch, "empty", lambda shape, dtype, device: real(shape, dtype=dtype)
    ):
        yield


def call(kernel: Kernel, inputs: tuple[Tensor, ...], *others: Tensor) -> tuple[Tensor, ...]:
    """Two launches: into a buffer, and from there into the result."""
    key = key_of(inputs)
    kind = known(key)
    if kind is not None:
        return kind.again(inputs)

    def run() -> tuple[Tensor]:
        between = empty((3, 4), torch.float32, GPU)
        out = empty((4,), torch.float32, GPU)
        launch.launch(kernel, (2,), inputs[0][1:], between, 8, BLOCK=16, num_warps=4)
        launch.launch(kernel, (1, 3), others[0] if others else between[2:], out, 4, BLOCK=16)
        return (out,)

    return recorded(key, inputs, GPU, run)


def test_the_second_call_passes_its_own_addresses() -> None:
    kernel = Kernel()
    call(kernel, (torch.zeros(6),))
    assert len(kernel.first) == 2
    assert kernel.again == []
    x = torch.zeros(6)
    (out,) = call(kernel, (x,))
    assert len(kernel.first) == 2
    (grid, args), (last_grid, last_args) = kernel.again
    assert (grid, last_grid) == ((2, 1, 1), (1, 3, 1))
    assert args[0] == x.data_ptr() + 4
    assert args[2:] == [8, 16]
    assert last_args[0] == args[1] + 2 * 4 * 4  # further on in the same buffer
    assert last_args[1] == out.data_ptr()
    assert out.shape == (4,)


def test_another_kind_is_launched_by_triton() -> None:
    kernel = Kernel()
    for x in (
        torch.zeros(6),
        torch.zeros(7),
        torch.zeros(6, dtype=torch.int32),
        torch.zeros(7)[1:],
    ):
        call(kernel, (x,))
    assert len(kernel.first) == 8
    assert kernel.again == []


@pytest.mark.parametrize("why", ["elsewhere", "one storage", "says so"])
def test_what_cannot_be_made_again_is_not(why: str) -> None:
    kernel = Kernel()
    whole = torch.zeros(12)
    for _ in range(2):
        if why == "elsewhere":
            call(kernel, (torch.zeros(6),), torch.zeros(4))
        elif why == "one storage":
            call(kernel, (whole[:6], whole[6:]))
        else:
            with mock.patch.object(launch, "launch", lambda *a, **k: not_recorded()):
                call(kernel, (torch.zeros(6),))
    assert kernel.again == []
    assert len(kernel.first) == (0 if why == "says so" else 4)
