"""Strategy "direct" on two NVIDIA GPUs that write to each other's memory: values and gradients,
ragged numbers of tokens, CUDA graphs, and ranks that do not come.

Skipped elsewhere. ``pytest -m slow tests/e2e/test_cuda_direct.py``
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe_fx
from moe_fx.bench.layers import MODELS, build_model
from moe_fx.errors import MoeFxError
from moe_fx.testing import RankPool
from tests.e2e.test_cuda import CLOSE, compiled, errors, first, layer
from tests.passes.graphs import relative_error, tokens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(500),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@pytest.fixture(scope="module")
def gpus() -> Iterator[RankPool]:
    with RankPool(2, "cpu:gloo,cuda:nccl") as pool:
        yield pool


@pytest.mark.parametrize("lower", ["auto", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_block_gives_what_eager_gives(gpus: RankPool, dtype: torch.dtype, lower: str) -> None:
    for found in gpus.run(errors_of, dtype, lower, False, timeout=400):
        assert max(found) <= CLOSE[dtype]


@pytest.mark.parametrize("lower", ["auto", "off"])
def test_gradients_are_those_of_eager(gpus: RankPool, lower: str) -> None:
    for found in gpus.run(errors_of, torch.float32, lower, True, timeout=400):
        assert max(found) <= CLOSE[torch.float32]


def errors_of(rank: int, dtype: torch.dtype, lower: str, training: bool) -> list[float]:
    return errors(rank, "qwen3_moe", dtype, "direct", 1, training, lower=lower)


def ragged(rank: int, counts: list[list[int]]) -> tuple[list[float], str]:
    torch.cuda.set_device(rank)
    module = layer("qwen3_moe", torch.float32)
    reports: list[moe_fx.Report] = []
    run = compiled(module, strategy="direct", on_report=reports.append)
    found = []
    with torch.no_grad():
        for step, count in enumerate(counts[rank]):
            values = tokens(1, 4096, 128, seed=step + 10 * rank).cuda()[:, :count]
            out, wanted = first(run(values)), first(module(values))
            found.append(relative_error(wanted, out) if count else float(out.numel()))
    return found, reports[0].plans[0].host_sync


def test_any_numbers_of_tokens(gpus: RankPool) -> None:
    """Memory grows with the third step."""
    counts = [[16, 5, 4000, 0, 7], [3, 900, 2, 64, 7]]
    for found, host_sync in gpus.run(ragged, counts, timeout=400):
        assert max(found) <= CLOSE[torch.float32]
        assert host_sync == ""


def captured(run: Any, values: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            first(run(values))
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = first(run(values))
    return graph, out


def replayed(rank: int, times: int) -> float:
    """The largest error of so many replays on other tokens."""
    torch.cuda.set_device(rank)
    module = layer("qwen3_moe", torch.bfloat16)
    values = tokens(1, 64, 128, dtype=torch.bfloat16, seed=rank).cuda()
    largest = torch.zeros((), device="cuda")
    with torch.no_grad():
        graph, out = captured(compiled(module, strategy="direct"), values)
        for step in range(times):
            generator = torch.Generator("cuda").manual_seed(2 * step + rank)
            values.normal_(generator=generator)
            graph.replay()
            wanted = first(module(values))
            error = (out.float() - wanted.float()).norm() / wanted.float().norm()
            largest = torch.maximum(largest, error)
    return float(largest)


def test_a_thousand_replays_on_other_tokens(gpus: RankPool) -> None:
    assert max(gpus.run(replayed, 1000, timeout=400)) <= CLOSE[torch.bfloat16]


def reduced_overhead(rank: int) -> list[float]:
    torch.cuda.set_device(rank)
    module = layer("qwen3_moe", torch.bfloat16)
    torch._dynamo.reset()
    options = {"ep_group": dist.group.WORLD, "strategy": "direct", "mode": "reduce-overhead"}
    run = torch.compile(module, backend="moe_fx", options=options, dynamic=False)
    found = []
    with torch.no_grad():
        for step in range(6):
            values = tokens(1, 32, 128, dtype=torch.bfloat16, seed=10 * step + rank).cuda()
            torch.compiler.cudagraph_mark_step_begin()
            out = first(run(values)).clone()
            found.append(relative_error(first(module(values)), out))
    return found


def test_inductors_own_cuda_graphs(gpus: RankPool) -> None:
    for found in gpus.run(reduced_overhead, timeout=400):
        assert max(found) <= CLOSE[torch.bfloat16]


def missing(rank: int, replays: bool) -> tuple[str, float]:
    """What rank 0 hears of rank 1, which takes no part in the last step; and after how long."""
    torch.cuda.set_device(rank)
    module = layer("qwen3_moe", torch.bfloat16)
    group = dist.new_group()
    run = compiled(module, strategy="direct", ep_group=group, exchange_timeout=3.0)
    values = tokens(1, 64, 128, dtype=torch.bfloat16, seed=rank).cuda()
    with torch.no_grad():
        graph, _ = captured(run, values)
        graph.replay()
        torch.cuda.synchronize()
        dist.barrier()
        if rank == 1:
            return "", 0.0
        began = time.monotonic()
        try:
            if replays:
                graph.replay()
            else:
                run(values)
            torch.cuda.synchronize()
            while time.monotonic() - began < 20.0:
                time.sleep(0.01)
        except MoeFxError as error:
            return str(error), time.monotonic() - began
    return "", 0.0


@pytest.mark.parametrize("replays", [False, True])
def test_a_rank_that_does_not_come_is_named(replays: bool) -> None:
    with RankPool(2, "cpu:gloo,cuda:nccl") as pool:
        said, seconds = pool.run(missing, replays, timeout=400)[0]
    assert "rank(s) [1]" in said
    assert seconds < 13


def generated(rank: int, new: int) -> tuple[list[int], list[int], set[str]]:
    """By one GPU, and by both; and the strategies."""
    torch.cuda.set_device(rank)
    torch.manual_seed(0)
    model = build_model(MODELS["qwen3"], torch.device("cuda", rank), torch.float32)
    ids = torch.arange(7 + 9 * rank, device="cuda").unsqueeze(0)
    length = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    alone = model.generate(ids, **length)
    reports: list[moe_fx.Report] = []
    options = {
        "ep_group": dist.group.WORLD,
        "progress": False,
        "on_report": reports.append,
        "strict": True,
    }
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="moe_fx", dynamic=True, options=options)
    together = model.generate(ids, **length)
    taken = {plan.strategy for report in reports for plan in report.plans}
    return alone[0].tolist(), together[0].tolist(), taken


def test_a_model_of_real_widths_generates_what_one_gpu_does(gpus: RankPool) -> None:
    """Two layers of Qwen3-30B-A3B in float32; prompts of other lengths."""
    for alone, together, taken in gpus.run(generated, 32, timeout=400):
        assert together == alone
        assert taken == {"direct"}
