"""A device that runs ATen ops and the dialect's own kernels: CPUs and GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.fx import GraphModule

from moe_fx.bases.inductor import compile_by_base
from moe_fx.device import Device
from moe_fx.options import Options
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

    def lower(self, module: GraphModule, options: Options, report: Report) -> None:
        """Put ops of the device in the place of dialect ops, in a graph that ``options.base`` is
        compiling. Only called where `lowers`."""
        raise NotImplementedError(f"{type(self).__name__} has no lowering")
