"""A pass over the graphs that a device's compiler runs, as its hooks call it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule

from moe_fx.errors import ConfigurationError
from moe_fx.options import Options
from moe_fx.report import Report
from moe_fx.sources import SOURCES

HOOK = "post_grad_custom_pre_pass"


class DevicePass(ABC):
    """report: gets what was lowered."""

    def __init__(self, options: Options, report: Report) -> None:
        self.options, self.report = options, report

    @abstractmethod
    def __call__(self, module: GraphModule, example_inputs: Any = None, config: Any = None) -> None:
        """Changes ``module`` in place."""

    def among(self, base_options: Mapping[str, Any]) -> dict[str, Any]:
        """The compiler's options with this pass in its hook. Raises `ConfigurationError` if the
        hook is taken."""
        if HOOK in base_options:
            raise ConfigurationError(
                f"base_options: {HOOK!r} is where moe_fx's own pass goes. Use "
                "'post_grad_custom_post_pass', or compile with the compiler itself and call "
                "moe_fx.MoEPass from your hook."
            )
        return {**base_options, HOOK: self}

    def uuid(self) -> str:
        """Key of what this does to a graph, for compile caches."""
        described = self.options.model_dump(exclude={"ep_group", "on_report"})
        return f"{type(self).__qualname__} {SOURCES} {torch.__version__} {described}"
