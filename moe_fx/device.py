"""What the passes ask of the device that a graph is for.

Passes import no device: whoever runs them hands over one of these in their `Context`
(`moe_fx.devices.device_for`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Device:
    """The answers of a device that runs the dialect's own kernels, as CPUs and GPUs do.

    lowers: in the graphs that the base compiler runs, dialect ops become ops of the device.
    fuses_routers: the device has an op that scores and selects; trains_routers: also where it is
    differentiated. fuses_experts: it has kernels for a local layer's experts whole
    (`moe_fx.ops.fused`). takes_mc2: it has the ops of strategy "mc2", which are then the first
    choice where all ranks have as many tokens.
    """

    lowers: bool = False
    fuses_routers: bool = False
    trains_routers: bool = False
    fuses_experts: bool = False
    takes_mc2: bool = False

    def mc2_misfit(self, tokens: int | None, hidden: int, top_k: int, world_size: int) -> str:
        """What is against MC2 for such a layer; "" if nothing is. tokens: the most that a rank may
        have, None: there is no bound."""
        return ""

    def unreachable(self, group: dist.ProcessGroup, device: torch.device, timeout: float) -> str:
        """Why the group's ranks cannot write to each other's memory, where strategy "direct" is
        kernels that do; "" if they can. All ranks ask."""
        return ""

    def is_gpu(self, device: torch.device) -> bool:
        """Whether tensors on ``device`` are a GPU's: strategy "direct" is kernels that write to
        peers, and what the host launches takes it longer than small pieces take the device."""
        return False
