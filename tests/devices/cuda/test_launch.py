"""Launches made again: the addresses are those of the later call's tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from moe_fx.devices.cuda import launch, recording
from moe_fx.devices.cuda.launch import cast, empty, key_of, known, recorded

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


def _on_the_host(shape: Any, strides: Any, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Buffers on the host in place of a GPU's."""
    real = torch.empty
    monkeypatch.setattr(launch, "_kinds", {})
    driver = mock.Mock(active=mock.Mock(get_current_stream=lambda _: 5))
    monkeypatch.setattr(recording, "driver", driver)
    monkeypatch.setattr(recording, "empty_on", lambda _: _on_the_host)
    with mock.patch.object(torch, "empty", lambda shape, dtype, device: real(shape, dtype=dtype)):
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


@pytest.mark.parametrize("why", ["elsewhere", "one storage"])
def test_what_cannot_be_made_again_is_not(why: str) -> None:
    kernel = Kernel()
    whole = torch.zeros(12)
    for _ in range(2):
        if why == "elsewhere":
            call(kernel, (torch.zeros(6),), torch.zeros(4))
        else:
            call(kernel, (whole[:6], whole[6:]))
    assert kernel.again == []
    assert len(kernel.first) == 4


def mixed(x: Tensor, seen: list[Any]) -> tuple[Tensor, ...]:
    """torch's own kernels among launches: results of other dtypes, views, in place, nothing."""
    key = key_of((x,))
    kind = known(key)
    if kind is not None:
        return kind.again((x,))

    def run() -> tuple[Tensor, ...]:
        wide = cast(x[2:], torch.float64)
        buffer = empty((4,), torch.float64, GPU)
        launch.call(torch.Tensor.copy_, buffer, wide)
        launch.call(torch.Tensor.mul_, buffer, 10.0)
        product = launch.call(torch.outer, buffer[1:], wide)
        seen.append(launch.call(torch.full_like, product, 1.0))
        launch.call(torch.Tensor.add_, product, seen[-1])
        return product.t(), cast(wide, torch.float64), x.new_empty(0)

    return recorded(key, (x,), GPU, run)


def test_what_torch_is_called_for_is_called_again_on_the_same_views() -> None:
    seen: list[Any] = []
    for start in (0.0, 5.0):
        x = torch.arange(6.0) + start
        product, wide, none = mixed(x, seen)
        expected = torch.outer(x[2:], 10 * x[3:]).double() + 1
        torch.testing.assert_close(product, expected)
        assert product.stride() == (1, 4)
        torch.testing.assert_close(wide, x[2:].double())
        assert none.shape == (0,)
    assert len(seen) == 1  # what was recorded is what ran


def test_large_buffers_are_freed_when_they_were_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_PACKED", 16)
    kernel = Kernel()
    call(kernel, (torch.zeros(6),))
    (kind,) = launch._kinds.values()
    assert kind is not None
    names = [type(step).__name__ for step in kind.steps]
    assert names == ["_Allocate", "_Launch", "_Allocate", "_Launch", "_Free"]
