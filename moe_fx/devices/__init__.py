"""Devices, a folder or a file each: what the base compiler is given for a graph on one of them.

A new device is a class like `moe_fx.devices.plain.Plain`, which answers what the passes ask
(`moe_fx.device.Device`) and compiles, and a line in `device_for`. Nothing below this folder imports
a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_fx.devices.ascend.device import Ascend, is_for_ascend
from moe_fx.devices.cuda.device import Cuda, is_for_cuda
from moe_fx.devices.plain import Plain
from moe_fx.options import Options

__all__ = ["device_for"]


def device_for(options: Options, inputs: Sequence[Any]) -> Plain:
    """The device that graphs with these inputs are compiled for."""
    if is_for_ascend(options, inputs):
        return Ascend.of(options, inputs)
    return Cuda.of(options) if is_for_cuda(options, inputs) else Plain()
