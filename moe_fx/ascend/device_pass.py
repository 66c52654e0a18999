"""A pass over the graphs that a device's compiler runs, as its hooks call it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch.fx import GraphModule

from moe_fx.options import Options
from moe_fx.report import Report
from moe_fx.sources import SOURCES


class DevicePass(ABC):
    """report: gets what was lowered."""

    def __init__(self, options: Options, report: Report) -> None:
        self.options, self.report = options, report

    @abstractmethod
    def __call__(self, module: GraphModule, example_inputs: Any = None, config: Any = None) -> None:
        """Changes ``module`` in place."""

    def uuid(self) -> str:
        """Key of what this does to a graph, for compile caches."""
        described = self.options.model_dump(exclude={"ep_group", "on_report"})
        return f"{type(self).__qualname__} {SOURCES} {torch.__version__} {described}"
