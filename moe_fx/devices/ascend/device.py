"""Ascend NPUs, as passes and compilers see them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.fx import GraphModule

from moe_fx.devices.ascend import npu
from moe_fx.devices.ascend.compile import EAGER, compile_lowered, device_pass
from moe_fx.devices.ascend.mc2 import limits
from moe_fx.devices.plain import Plain
from moe_fx.options import Options
from moe_fx.report import Report


def is_for_ascend(options: Options, inputs: Sequence[Any]) -> bool:
    """Whether the inputs are on an NPU, or graphs with them are lowered to NPU ops elsewhere."""
    return _on_npu(inputs) or _lowers(options, inputs)


class Ascend(Plain):
    """takes_mc2: the graph is on an NPU. Elsewhere MC2's ops have reference kernels, without its
    limits."""

    @classmethod
    def of(cls, options: Options, inputs: Sequence[Any]) -> Ascend:
        lowers = _lowers(options, inputs)
        return cls(lowers=lowers, fuses_routers=lowers, takes_mc2=_on_npu(inputs))

    def mc2_misfit(self, tokens: int | None, hidden: int, top_k: int, world_size: int) -> str:
        return limits(tokens, hidden, top_k, world_size) if self.takes_mc2 else ""

    def compile(
        self,
        module: GraphModule,
        inputs: Sequence[Any],
        options: Options,
        report: Report,
        training: bool,
    ) -> Callable[..., Any]:
        if self.lowers:
            return compile_lowered(module, inputs, options, report)
        return super().compile(module, inputs, options, report, training)

    def finish(self, module: GraphModule, options: Options, report: Report) -> None:
        if self.lowers:
            device_pass(options, report)(module)
        else:
            super().finish(module, options, report)


def _on_npu(inputs: Sequence[Any]) -> bool:
    return any(isinstance(value, Tensor) and value.device.type == "npu" for value in inputs)


def _lowers(options: Options, inputs: Sequence[Any]) -> bool:
    if options.lower != "auto":
        return options.lower == "npu"
    return options.base in npu.COMPILERS or (_on_npu(inputs) and options.base in EAGER)
