"""Work beside the main stream: on a stream of its own where the device has them, else in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["Beside", "side_stream"]


def side_stream(device: torch.device) -> Any:
    """A new stream of ``device``; None on the CPU, which has none."""
    if device.type == "cpu":
        return None
    return torch.get_device_module(device).Stream(device=device)


class Beside:
    """``work()``, begun on ``stream`` once what is queued now is done; ``result()`` makes the
    current stream wait for it. Without a stream, or while a compiler traces, it runs at once."""

    def __init__(self, work: Callable[[], Any], stream: Any) -> None:
        self.stream = None if torch.compiler.is_compiling() else stream
        if self.stream is None:
            self.value = work()
            return
        module = torch.get_device_module(self.stream.device)
        self.stream.wait_stream(module.current_stream())
        with module.stream(self.stream):
            self.value = work()

    def result(self) -> Any:
        if self.stream is not None:
            current = torch.get_device_module(self.stream.device).current_stream()
            current.wait_stream(self.stream)
            for tensor in self.value if isinstance(self.value, (tuple, list)) else (self.value,):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(current)
        return self.value
