"""The eager dispatcher on two NVIDIA GPUs, over NCCL: as one dense layer on one GPU.

Skipped elsewhere. ``pytest -m slow tests/e2e/test_cuda_dispatcher.py``
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import moe_fx
from moe_fx.testing import RankPool
from tests.cuda_ranks import needs_cuda, take_gpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    needs_cuda,
]
EXPERTS, TOP_K, HIDDEN, WIDTH = 8, 2, 128, 64


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    with RankPool(2, "cpu:gloo,cuda:nccl") as pool:
        yield pool


class Layer(torch.nn.Module):
    """With all experts, or the rank's own behind a dispatcher."""

    def __init__(self, rank: int, dispatcher: Any) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def table(*sizes: int) -> Tensor:
            return (torch.randn(sizes, generator=generator) * sizes[-2] ** -0.5).cuda()

        own = slice(None) if dispatcher is None else slice(4 * rank, 4 * rank + 4)
        self.gate = torch.nn.Parameter(table(HIDDEN, EXPERTS))
        self.up = torch.nn.Parameter(table(EXPERTS, HIDDEN, 2 * WIDTH)[own].clone())
        self.down = torch.nn.Parameter(table(EXPERTS, WIDTH, HIDDEN)[own].clone())
        self.shared = torch.nn.Parameter(table(HIDDEN, HIDDEN))
        self.dispatcher = dispatcher

    def experts(self, rows: Tensor, ends: Tensor) -> Tensor:
        gate, value = torch.ops.moe_fx.grouped_mm(rows, self.up, ends).chunk(2, -1)
        return torch.ops.moe_fx.grouped_mm((F.silu(gate) * value), self.down, ends)

    def forward(self, x: Tensor) -> Tensor:
        probs, ids = (x @ self.gate).softmax(-1).topk(TOP_K)
        if self.dispatcher is None:
            rows, row_map = torch.ops.moe_fx.permute(x, ids)
            ends = torch.ops.moe_fx.expert_counts(ids, EXPERTS).cumsum(0).int()
            rows = self.experts(rows, ends)
            return torch.ops.moe_fx.unpermute(rows, row_map, probs, x.shape) + x @ self.shared
        self.dispatcher.set_shared_experts(lambda tokens: tokens @ self.shared)
        shared, rows, counts = self.dispatcher.token_permutation(x, probs, ids)
        out, _ = self.dispatcher.token_unpermutation(self.experts(rows, counts.cumsum(0).int()))
        return out + shared


def make(rank: int, **fields: Any) -> Layer:
    take_gpu(rank)
    config = moe_fx.MoEDispatcherConfig(num_local_experts=4, moe_router_topk=TOP_K, **fields)
    return Layer(rank, moe_fx.MoEAlltoAllSeqOverLapDispatcher(config))


def tokens(rank: int, count: int) -> Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(rank)).cuda()


def errors(rank: int, compiled: bool) -> dict[str, float]:
    layer, whole = make(rank), Layer(rank, None)
    found: list[Tensor] = []
    run = layer
    if compiled:
        torch._dynamo.reset()
        options = {"overlap": 2, "strategy": "alltoall", "strict": True}
        run = torch.compile(layer, backend="moe_fx", fullgraph=True, options=options)  # type: ignore[assignment]
    for call in (run, whole):
        x = tokens(rank, 300 + 17 * rank).requires_grad_()
        out = call(x)
        out.square().mean().backward()
        assert x.grad is not None
        found += [out.detach(), x.grad]
    out, grad, expected, expected_grad = found
    assert moe_fx.MoEAlltoAllSeqOverLapDispatcher.overlap_stream is not None or compiled
    return {"out": _relative(out, expected), "grad": _relative(grad, expected_grad)}


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_as_one_dense_layer(gpus: RankPool, compiled: bool) -> None:
    for found in gpus.run(errors, compiled, timeout=400.0):
        assert max(found.values()) <= 1e-3, found  # TF32 may be on


def bad(rank: int) -> str:
    layer = make(rank)
    x = tokens(rank, 32)
    probs, ids = (x @ layer.gate).softmax(-1).topk(TOP_K)
    if rank == 1:
        ids = ids + EXPERTS
    try:
        layer.dispatcher.token_permutation(x, probs, ids)
    except moe_fx.BadInput as error:
        return str(error)
    return ""


def test_bad_ids_are_an_error_on_both(gpus: RankPool) -> None:
    assert all("rank 1: an expert id is" in said for said in gpus.run(bad))


def capacity(rank: int, pad: bool) -> bool:
    layer = make(rank, moe_expert_capacity_factor=0.5, moe_pad_expert_input_to_capacity=pad)
    out = layer(tokens(rank, 64))
    out.square().mean().backward()
    return bool(out.isfinite().all()) and layer.up.grad is not None


@pytest.mark.parametrize("pad", [False, True])
def test_capacity(gpus: RankPool, pad: bool) -> None:
    assert all(gpus.run(capacity, pad))


def counted(rank: int) -> list[int]:
    """Counts and status, any wait of the host for the device being an error."""
    take_gpu(rank)
    ids = torch.randint(EXPERTS, (64, TOP_K), device="cuda")
    torch.ops.moe_fx.dispatch_counts(ids, EXPERTS, HIDDEN, 0)  # loads what the first call loads
    torch.cuda.set_sync_debug_mode("error")
    try:
        counts, status = torch.ops.moe_fx.dispatch_counts(ids, EXPERTS, HIDDEN, 0)
        torch.ops.moe_fx.arrived_experts(counts.view(2, -1), ids.numel())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return status.tolist()


def test_counts_do_not_make_the_host_wait(gpus: RankPool) -> None:
    assert gpus.run(counted) == [[0, 0, HIDDEN, 0, EXPERTS]] * 2
