"""``python -m tests.bench.cuda``: an MoE layer on two NVIDIA GPUs, side by side.

bf16, forward, replicated weights; medians of interleaved rounds, by CUDA events, of the slower
rank. compute: the same experts' work with nothing exchanged (each rank all experts, own tokens).
exchange: as many rows as a rank's tokens have, half of them to the other rank and back, and nothing
else, in so many pieces at once. captured: replays of a CUDA graph of a plan without a host sync.

``--transport`` is how NCCL carries rows between the two; ``shm``: through the host's memory, as
where GPUs cannot reach each other.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

import moe_fx
from moe_fx.testing import run_ranks
from tests.bench import layers
from tests.bench.exchanges import there_and_back

ROUNDS, WARM_UP = 30, 5
PIECES = (1, 4, 8)
VARIANTS: dict[str, dict[str, Any]] = {
    "compute": {},
    **{f"alltoall, {n}": {"strategy": "alltoall", "overlap": n} for n in ("off", 2, 4)},
    **{f"allgather, {n}": {"strategy": "allgather", "overlap": n} for n in (1, 2)},
    "padded, 1": {
        "strategy": "padded_alltoall",
        "capacity_factor": 1.25,
        "on_overflow": "drop",
        "overlap": 1,
    },
    "auto": {},
}
CAPTURED = ("compute", "allgather, 1", "allgather, 2", "padded, 1")


class Transport(str, Enum):
    NVLINK = "nvlink"
    SHM = "shm"


class Model(str, Enum):
    """Whose layer: Qwen3-30B-A3B's or Mixtral-8x7B's."""

    QWEN3 = "qwen3"
    MIXTRAL = "mixtral"


LAYERS = {
    Model.QWEN3: (replace(layers.LAYERS["qwen3"], hidden=2048, num_experts=128, top_k=8), 768),
    Model.MIXTRAL: (replace(layers.LAYERS["mixtral"], hidden=4096, num_experts=8, top_k=2), 14336),
}
"""And the width of an expert."""


def block(layer: layers.Layer, width: int) -> nn.Module:
    torch.manual_seed(0)
    with torch.device("cuda"):
        module = layer.make(layer, width).to(torch.bfloat16).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module.requires_grad_(False)


def measure(rank: int, model: Model, num_tokens: int, programs: list[str]) -> dict[str, Any]:
    torch.cuda.set_device(rank)
    layer, width = LAYERS[model]
    module = block(layer, width)
    values = torch.randn(1, num_tokens, layer.hidden, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.config.recompile_limit = 2 * len(VARIANTS)
    calls: dict[str, Callable[[], object]] = {}
    results: dict[str, Any] = {}
    with torch.no_grad():
        expected = _first(module(values)).float()
        for name in programs:
            say(rank, f"compiling {name}")
            given = VARIANTS[name]
            reports: list[moe_fx.Report] = []
            options = {"strict": True, "on_report": reports.append, **given}
            if name != "compute":
                options["ep_group"] = dist.group.WORLD
            run = torch.compile(module, backend="moe_fx", options=options)
            found = _first(run(values)).float()
            error = float((found - expected).norm() / expected.norm())
            results[name] = {"error": error, "plan": reports[0].plans[0].summary}
            calls[name] = lambda run=run: run(values)
            for _ in range(WARM_UP):
                run(values)
            if name in CAPTURED:
                calls[f"{name}, captured"] = _captured(calls[name]).replay
        rows = values[0].repeat(layer.top_k, 1)
        for pieces in PIECES:
            calls[f"exchange, {pieces}"] = _exchange(rows, pieces)
        say(rank, "timing")
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, call in calls.items():
                torch.cuda.synchronize()
                dist.barrier()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end))
    for name, each in times.items():
        results.setdefault(name, {"error": 0.0, "plan": ""})["ms"] = median(each)
    return results


def say(rank: int, text: str) -> None:
    if rank == 0:
        print(f"{text} ...", file=sys.stderr, flush=True)


def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        call()
    return graph


def _exchange(rows: Tensor, pieces: int) -> Callable[[], None]:
    arriving, returned = torch.empty_like(rows), torch.empty_like(rows)
    buffers = [each.chunk(pieces) for each in (rows, arriving, returned)]
    equal = [None] * pieces
    return lambda: there_and_back(*buffers, equal, equal)


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def main(
    layer: Model = Model.QWEN3,
    transport: Annotated[Transport, typer.Option(help="How NCCL carries rows.")] = Transport.NVLINK,
    program: Annotated[list[str] | None, typer.Option(help="Repeatable; all if none.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Of each rank; repeatable.")] = None,
) -> None:
    for name in program or ():
        if name not in VARIANTS:
            raise typer.BadParameter(f"--program {name}: give {'; '.join(VARIANTS)}")
    wanted = {"compute", "alltoall, off", *(program or VARIANTS)}
    programs = [name for name in VARIANTS if name in wanted]
    if transport is Transport.SHM:
        os.environ["NCCL_P2P_DISABLE"] = "1"
    for num_tokens in tokens or (8192, 1024):
        ranks = run_ranks(
            *(2, measure, layer, num_tokens, programs), timeout=900, backend="cpu:gloo,cuda:nccl"
        )
        ms = {name: max(rank[name]["ms"] for rank in ranks) for name in ranks[0]}
        exchange = min(ms[f"exchange, {pieces}"] for pieces in PIECES)
        bound, off = max(ms["compute"], exchange), ms["alltoall, off"]
        print(
            f"{layer.value}, {transport.value}, {num_tokens} tokens a rank, "
            f"{torch.cuda.get_device_name()}: exchange / compute {exchange / ms['compute']:.2f}",
            flush=True,
        )
        for name, took in ms.items():
            error = max(rank[name]["error"] for rank in ranks)
            hidden = f"hidden {(off - took) / (off - bound):5.0%}" if off > bound else ""
            print(
                f"  {name:24} {took:8.3f} ms   / bound {took / bound:5.2f}   "
                f"{hidden if name.startswith(('alltoall', 'auto')) else '':12}   "
                f"error {error:.1e}   {ranks[0][name]['plan']}"
            )
        print(json.dumps(ms))


if __name__ == "__main__":
    typer.run(main)
