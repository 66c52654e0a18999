"""A pass over the graphs that a device's compiler runs, as its hooks call it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, final

from torch.fx import Graph, GraphModule, Node

from moe_fx.bases.inductor import beside
from moe_fx.options import Options
from moe_fx.passes.overlap.overlap import overlap
from moe_fx.region import Lowered
from moe_fx.report import Report

_HOOK = "post_grad_custom_pre_pass"


def is_dialect(node: Node) -> bool:
    return getattr(node.target, "namespace", "") == "moe_fx"


class DevicePass(ABC):
    """Orders one graph and lowers it, in place; leaves one without dialect ops as it came. report:
    gets what was lowered."""

    def __init__(self, options: Options, report: Report) -> None:
        self.options, self.report = options, report

    @final
    def __call__(self, module: GraphModule, example_inputs: Any = None, config: Any = None) -> None:
        if not any(is_dialect(node) for node in module.graph.nodes):
            return
        if self.options.overlap != "off":
            overlap(module.graph, self.options.overlap_memory)
        self.report.lowered += self._lower(module.graph)
        module.recompile()

    @abstractmethod
    def _lower(self, graph: Graph) -> list[Lowered]: ...

    def among(self, base_options: Mapping[str, Any]) -> dict[str, Any]:
        """The compiler's options with this pass in its hook. Raises `ConfigurationError` if the
        hook is taken."""
        return beside(base_options, {_HOOK: self})
