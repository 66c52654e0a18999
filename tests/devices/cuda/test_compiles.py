"""Every kernel compiles for Ampere and for Hopper, in the dtypes that models mix. Triton needs no
GPU for that; its interpreter, which runs the kernels elsewhere, takes programs that it refuses."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from tests.ops.test_fused_experts import layer

triton = pytest.importorskip("triton", minversion="3.7", reason="as the interpreter's tests")

KERNELS = ("gate", "gemm", "grad", "peers", "rows", "sort")
CARDS = {"Ampere": 80, "Hopper": 90}
FLOATS = [torch.bfloat16, torch.float16, torch.float32]


class _Driver:
    """Of a card that is not there."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> Any:
        return self.target  # compiled kernels are kept by device

    def get_current_stream(self, _: Any) -> int:
        return 0


@contextmanager
def compiling(card: str) -> Iterator[list[Any]]:
    """What is launched within is compiled and not run; the list of it."""
    from triton.runtime import driver

    compiled: list[Any] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
        compiled.append(kernel.warmup(*args, grid=grid, **constants))

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(CARDS[card])))
        for name in KERNELS:
            module = importlib.import_module(f"moe_fx.devices.cuda.kernels.{name}")
            stack.enter_context(mock.patch.object(module, "launch", launch))
        yield compiled


def mixed() -> list[tuple[torch.dtype, torch.dtype | None]]:
    """Of tokens, and of routing weights."""
    return [(each, None) for each in FLOATS] + [
        (each, weights) for each in FLOATS for weights in {each, torch.float32}
    ]


@pytest.mark.parametrize("card", CARDS)
def test_kernels_of_peers(card: str) -> None:
    from moe_fx.devices.cuda.kernels import peers

    tokens, top_k, hidden, world, local, places = 3, 2, 2048, 2, 4, 6
    numbers = torch.zeros(2, dtype=torch.int64)
    here = torch.zeros(places, top_k, dtype=torch.int32)
    ids = torch.zeros(tokens, top_k, dtype=torch.int64)
    with compiling(card) as compiled:
        peers.meet(numbers, numbers, numbers, torch.zeros(4, dtype=torch.int64), numbers, 3, 9.0, 1)
        for dtype, of_weights in mixed():
            state, rows = numbers, torch.zeros(places, hidden, dtype=dtype)
            weights = None if of_weights is None else torch.zeros(tokens, top_k, dtype=of_weights)
            factors = None if of_weights is None else torch.zeros(places, top_k, dtype=of_weights)
            at = (256, 512, 1024)
            peers.push(state, rows[:tokens], ids, weights, numbers, at, tokens, 1, local)
            peers.fetch(state, rows, here, factors)
            peers.put_back(state, rows, factors, here, numbers, at[:2], tokens, 1)
            for mapped, bias in ((True, rows[:local]), (False, None)):
                pairs = torch.zeros(places * top_k, hidden, dtype=dtype)
                given = here, numbers, 256, tokens, 1, dtype, mapped
                peers.put_sums(state, pairs, here.view(-1), *given, factors, bias)
            peers.final(state, rows, ids, world, tokens, local)
            if factors is not None:
                peers.pick(state, factors, ids, tokens, local, world * local)
    assert len(compiled) > 40


def arguments(dtype: torch.dtype, weights: torch.dtype | None, **given: Any) -> list[Any]:
    made = layer(tokens=5, experts=4, top_k=2, hidden=256, inner=128, dtype=dtype, **given)
    if weights is None:
        made[2] = None
    else:
        made[2] = made[2].to(weights)
    return made


LAYERS: list[dict[str, Any]] = [
    {"layout": "halves"},
    {"layout": "halves", "transposed": True},
    {"layout": "interleaved", "biased": True, "clamped": True},
    {"layout": "separate", "biased": True},
    {"layout": "single", "act": "relu2"},
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("given", LAYERS, ids=str)
@pytest.mark.parametrize("card", CARDS)
def test_kernels_of_a_layer(card: str, given: dict[str, Any]) -> None:
    """The ways that are taken where nothing was measured, forward and backward."""
    from moe_fx.devices.cuda import backward, experts

    with compiling(card) as compiled:
        for dtype, of_weights in mixed():
            made = arguments(dtype, of_weights, **given)
            needed = [each is not None for at, each in enumerate(made[:9]) if at != 1]
            experts.forward(*made)
            result, *kept = experts.forward_training(*made)
            backward.backward(torch.zeros_like(result), *kept, *made, needed)
    assert len(compiled) > 60


@pytest.mark.parametrize("card", CARDS)
def test_the_gate(card: str) -> None:
    from moe_fx.devices.cuda.kernels.gate import gate

    with compiling(card) as compiled:
        for dtype in FLOATS:
            logits = torch.zeros(7, 64, dtype=dtype)
            gate(logits, 4, "softmax", None, 1, 1, "top2", 0.0, 1.0)
            for bias in (torch.zeros(64), torch.zeros(64, dtype=dtype)):
                gate(logits, 4, "sigmoid", bias, 8, 4, "top2", 1e-20, 2.5)
    assert len(compiled) == 9
