"""The programs that are measured side by side, each of the same block of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from moe_fx.report import Report
from moe_fx.weights.expert_parameters import likely_experts

__all__ = ["CAPTURED", "EXCHANGE", "HF_COMPILED", "PROGRAMS", "CannotRun", "hugging_face", "make"]

COMPUTE, EXCHANGE, HF_EAGER, HF_COMPILED = "compute", "exchange", "hf_eager", "hf_compiled"
_OURS: dict[str, dict[str, Any]] = {
    "chunks1": {"strategy": "alltoall", "overlap": "off"},
    "chunks2": {"strategy": "alltoall", "overlap": 2},
    "chunks4": {"strategy": "alltoall", "overlap": 4},
    "direct": {"strategy": "direct"},
    "auto": {},
}
PROGRAMS: dict[str, str] = {
    COMPUTE: "compute alone",
    EXCHANGE: "exchange alone",
    HF_EAGER: "HF AllToAllEP",
    HF_COMPILED: "HF AllToAllEP compiled",
    "chunks1": "moe_fx, all-to-all",
    "chunks2": "2 chunks",
    "chunks4": "4 chunks",
    "direct": "direct",
    "auto": "auto",
}
"""compute: the whole block on each GPU, compiled. exchange: rows of all pairs there and back, by
the group's all-to-all, in equal parts."""
CAPTURED = ("direct",)
"""Measured as a CUDA graph too."""
Function = Callable[..., Any]


class CannotRun(Exception):
    """The program does not exist here; the message says why."""


@dataclass
class Program:
    """call: what stands in for the block or model. reports: of moe_fx; None: not ours."""

    call: Function
    reports: list[Report] | None = None

    def check(self) -> str:
        """The plan, once it has run; raises `CannotRun` if moe_fx left the layer as it was."""
        if self.reports is None:
            return ""
        plans = [plan.summary for report in self.reports for plan in report.plans]
        if not plans:
            said = [each.reason for report in self.reports for each in report.declined]
            raise CannotRun(f"moe_fx did not rewrite the layer: {'; '.join(said) or 'not found'}")
        return "; ".join(dict.fromkeys(plans))


def make(name: str, block: nn.Module, top_k: int, base: str) -> Program:
    """``block``: a block, or a model, of its own for the program, with the same weights on every
    rank."""
    if name == COMPUTE:
        return Program(torch.compile(block, dynamic=False, backend=base))
    if name == EXCHANGE:
        return Program(lambda tokens: _there_and_back(tokens, top_k))
    if name in (HF_EAGER, HF_COMPILED):
        module = hugging_face(block)
        return Program(torch.compile(module) if name == HF_COMPILED else module)
    reports: list[Report] = []
    options = {
        "ep_group": dist.group.WORLD,
        "progress": False,
        "base": base,
        "on_report": reports.append,
        **_OURS[name],
    }
    compiled = torch.compile(block, backend="moe_fx", dynamic=False, options=options)
    return Program(compiled, reports)


def _there_and_back(tokens: Tensor, top_k: int) -> Tensor:
    """As many rows as there are pairs, as far as they divide by the ranks."""
    world = dist.get_world_size()
    rows = tokens[0].repeat(top_k, 1)
    rows = rows[: len(rows) // world * world]
    there, back = torch.empty_like(rows), torch.empty_like(rows)
    dist.all_to_all_single(there, rows)
    dist.all_to_all_single(back, there)
    return back


def hugging_face(block: nn.Module) -> nn.Module:
    """transformers' own expert parallelism, of a block or model. Raises `CannotRun`."""
    try:
        from transformers.distributed.expert_parallel import apply_expert_parallelism
    except ImportError as error:
        raise CannotRun(f"this transformers has no AllToAllEP: {error}") from None
    device = next(block.parameters()).device.type
    shape = (dist.get_world_size(), 1)
    mesh = init_device_mesh(device, shape, mesh_dim_names=("ep", "tp"))
    paths = {slot.full_name.removesuffix(f".{slot.name}") for slot in likely_experts(block)}
    plan: dict[str, str] = {}
    for path in sorted(paths):
        plan |= {f"{path}.{name}": "grouped_gemm" for name in ("gate_up_proj", "down_proj")}
        plan[path] = "ep_dispatch_experts"
    module: nn.Module = apply_expert_parallelism(
        block, mesh["ep"], mesh["tp"], plan, ep_implementation="all_to_all"
    )
    return module
