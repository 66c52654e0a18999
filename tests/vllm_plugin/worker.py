"""A CPU worker whose MoE layers are the opaque op, as vLLM has them on other devices."""

from __future__ import annotations

from typing import Any

import torch
from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner
from vllm.v1.worker.cpu_worker import CPUWorker


def _opaque(runner: Any) -> Any:
    ops = torch.ops.vllm
    return ops.moe_forward if runner._shared_experts is None else ops.moe_forward_shared


class OpaqueWorker(CPUWorker):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        MoERunner._select_forward = _opaque
        # It asks for kernels that there are on GPUs only; Inductor does what it does.
        FixFunctionalizationPass.__call__ = lambda self, graph: None
        super().__init__(*args, **kwargs)
