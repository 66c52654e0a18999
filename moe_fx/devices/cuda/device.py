"""CUDA GPUs, as passes and compilers see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fx.devices.cuda.ops import HAS_TRITON
from moe_fx.devices.plain import Plain
from moe_fx.options import Options


def is_for_cuda(options: Options, inputs: Sequence[Any]) -> bool:
    """Whether the inputs are on a GPU that Triton compiles for, or graphs with them are fused as
    if they were."""
    return options.lower == "cuda" or (HAS_TRITON and _on_cuda(inputs))


class Cuda(Plain):
    @classmethod
    def of(cls, options: Options) -> Cuda:
        fuses = options.lower != "off"
        return cls(fuses_experts=fuses, fuses_routers=fuses, trains_routers=fuses)

    def unreachable(self, group: dist.ProcessGroup, device: torch.device, timeout: float) -> str:
        if not self.is_gpu(device):
            return ""
        from moe_fx.devices.cuda.peers.reach import unreachable

        return unreachable(group, device, timeout)

    def is_gpu(self, device: torch.device) -> bool:
        return device.type == "cuda"


def _on_cuda(inputs: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.device.type == "cuda" for value in inputs)
