"""Adds torch_npu ops to a graph, each checked first."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from moe_fx.devices.ascend.constraints import violations
from moe_fx.passes.lower import emit
from moe_fx.passes.lower.emit import Unmet, value_of

__all__ = ["Emit", "Unmet", "value_of"]


class Emit(emit.Emit):
    def npu(self, name: str, *args: Any, **kwargs: Any) -> Node:
        """``npu::name``. Raises `Unmet` if torch_npu lacks it or documents that it refuses this."""
        op = getattr(torch.ops.npu, name, None)
        if op is None:
            raise Unmet(f"this torch_npu has no {name}")
        wrong = violations(name, *map_arg((args, kwargs), value_of))
        if wrong:
            raise Unmet(f"npu::{name}: {'; '.join(wrong)}")
        return self(op.default, *args, **kwargs)
