"""moe_fx: a Mixture-of-Experts model written for one device becomes an expert-parallel program.

``torch.compile(model, backend="moe_fx", options={"ep_group": group})``
"""

from __future__ import annotations

from moe_fx import ops
from moe_fx.errors import ConfigurationError, MoeFxError, NothingMatched, RanksDiffer
from moe_fx.explain import explain
from moe_fx.options import Options
from moe_fx.region import Declined, Region, Router
from moe_fx.report import Report
from moe_fx.shard import expert_parameter_bytes, shard_experts

__version__ = "0.1.0"

__all__ = [
    "ConfigurationError",
    "Declined",
    "MoeFxError",
    "NothingMatched",
    "Options",
    "RanksDiffer",
    "Region",
    "Report",
    "Router",
    "expert_parameter_bytes",
    "explain",
    "ops",
    "shard_experts",
]
