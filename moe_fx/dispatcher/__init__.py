"""The eager dispatcher: vLLM-Ascend's `MoEAlltoAllSeqOverLapDispatcher` on moe_fx's ops.

`config.py` what it is told; `base.py` groups and routing; `exchange.py` one step, phase by phase;
`seq_overlap.py` the original's interface; `capacity.py` drops and padding; `tensor_parallel.py`
rows split over a second group; `streams.py` shared experts beside; `interleave.py` micro-batches.
"""

from __future__ import annotations

from moe_fx.dispatcher.base import MoEDispatcher
from moe_fx.dispatcher.config import MoEDispatcherConfig
from moe_fx.dispatcher.interleave import interleave
from moe_fx.dispatcher.seq_overlap import MoEAlltoAllSeqOverLapDispatcher

__all__ = [
    "MoEAlltoAllSeqOverLapDispatcher",
    "MoEDispatcher",
    "MoEDispatcherConfig",
    "interleave",
]
