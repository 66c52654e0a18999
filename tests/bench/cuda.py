"""``python -m tests.bench.cuda``: a Qwen3-30B-A3B MoE layer on two NVIDIA GPUs, side by side.

bf16, forward, replicated weights; medians of interleaved rounds, by CUDA events, of the slower
rank. compute: the same experts' work with nothing exchanged (each rank all experts, own tokens).
captured: replays of a CUDA graph of a plan without a host sync.
"""

from __future__ import annotations

import json
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import moe_fx
from moe_fx.testing import run_ranks

ROUNDS, WARM_UP = 30, 5
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


def block(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        experts_implementation="grouped_mm",
    )
    with torch.device("cuda"):
        module = Qwen3MoeSparseMoeBlock(config).to(torch.bfloat16).eval()
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return module


def measure(rank: int, num_tokens: int) -> dict[str, Any]:
    torch.cuda.set_device(rank)
    module = block().requires_grad_(False)
    values = torch.randn(1, num_tokens, 2048, device="cuda", dtype=torch.bfloat16)
    torch._dynamo.config.recompile_limit = 2 * len(VARIANTS)
    calls: dict[str, Any] = {}
    results: dict[str, Any] = {}
    with torch.no_grad():
        expected = _first(module(values)).float()
        for name, given in VARIANTS.items():
            reports: list[moe_fx.Report] = []
            options = {"strict": True, "on_report": reports.append, **given}
            if name != "compute":
                options["ep_group"] = dist.group.WORLD
            run = torch.compile(module, backend="moe_fx", options=options)
            found = _first(run(values)).float()
            error = float((found - expected).norm() / expected.norm())
            calls[name] = run
            results[name] = {"error": error, "plan": reports[0].plans[0].summary}
            for _ in range(WARM_UP):
                run(values)
            if name in CAPTURED:
                calls[f"{name}, captured"] = _captured(run, values).replay
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, run in calls.items():
                torch.cuda.synchronize()
                dist.barrier()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run(*([] if name.endswith("captured") else [values]))
                end.record()
                end.synchronize()
                times[name].append(start.elapsed_time(end))
    for name, each in times.items():
        results.setdefault(name, {"error": 0.0, "plan": ""})["ms"] = median(each)
    return results


def _captured(run: Any, values: Tensor) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run(values)
    return graph


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def main() -> None:
    for num_tokens in (8192, 1024):
        ranks = run_ranks(2, measure, num_tokens, timeout=900, backend="cpu:gloo,cuda:nccl")
        print(f"{num_tokens} tokens a rank, {torch.cuda.get_device_name()}", flush=True)
        for name in sorted(ranks[0]):
            ms = max(rank[name]["ms"] for rank in ranks)
            error = max(rank[name]["error"] for rank in ranks)
            print(f"  {name:24} {ms:8.3f} ms   error {error:.1e}   {ranks[0][name]['plan']}")
        print(json.dumps({name: max(r[name]["ms"] for r in ranks) for name in ranks[0]}))


if __name__ == "__main__":
    main()
