"""A device that runs ATen ops and the dialect's own kernels: CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from moe_fx.bases.inductor import compile_by_base
from moe_fx.device import Device
from moe_fx.options import Options
from moe_fx.passes.overlap.overlap import overlap
from moe_fx.report import Report


class Plain(Device):
    def compile(
        self,
        module: GraphModule,
        inputs: Sequence[Any],
        options: Options,
        report: Report,
        training: bool,
    ) -> Callable[..., Any]:
        """``module`` compiled by ``options.base``."""
        return compile_by_base(module, inputs, options, report, training)

    def finish(self, module: GraphModule, options: Options, report: Report) -> None:
        """What is left to do to a rewritten graph, in place, in the hook of a compiler that runs it
        next: order its exchanges, and put ops of the device in the place of dialect ops."""
        if options.overlap != "off":
            overlap(module.graph, options.overlap_memory, pinned=True)
