"""Programs that look like MoE layers to a careless eye. ``LOOK_ALIKES[name]`` says what is true."""

from __future__ import annotations

from tests.not_moe import odd, retrieval, routing
from tests.not_moe.base import LookAlike

__all__ = ["LOOK_ALIKES", "LookAlike"]

LOOK_ALIKES: dict[str, LookAlike] = {
    look_alike.name: look_alike
    for module in (retrieval, routing, odd)
    for look_alike in module.LOOK_ALIKES
}
