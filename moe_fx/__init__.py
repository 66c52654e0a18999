"""moe_fx: a Mixture-of-Experts model written for one device becomes an expert-parallel program.

``torch.compile(model, backend="moe_fx", options={"ep_group": group})``
"""

from __future__ import annotations

import sys

import torch

from moe_fx.supported import check_torch
from moe_fx.version import __version__

check_torch(torch.__version__)

from moe_fx import ops  # noqa: E402
from moe_fx.dispatcher import (  # noqa: E402
    MoEAlltoAllSeqOverLapDispatcher,
    MoEDispatcher,
    MoEDispatcherConfig,
    interleave,
)
from moe_fx.entry.estimate import inductor_runtime_estimation  # noqa: E402
from moe_fx.entry.explain import explain  # noqa: E402
from moe_fx.entry.graph_pass import MoEPass  # noqa: E402
from moe_fx.errors import (  # noqa: E402
    BadInput,
    ConfigurationError,
    DeclinedLayerWarning,
    MoeFxError,
    NothingMatched,
    RankMissing,
    RanksDiffer,
)
from moe_fx.options import Options  # noqa: E402
from moe_fx.region import Declined, Region, Router, Verification  # noqa: E402
from moe_fx.report import Report  # noqa: E402
from moe_fx.weights.clip import clip_grad_norm_  # noqa: E402
from moe_fx.weights.data_parallel import shards_for_data_parallel  # noqa: E402
from moe_fx.weights.shard import (  # noqa: E402
    expert_parameter_bytes,
    shard_experts,
    unshard_experts,
)
from moe_fx.weights.whole import full_state_dict  # noqa: E402

if "vllm.config.compilation" in sys.modules:  # it asks for ``moe_fx.vllm_pass`` by name
    from moe_fx.integrations.vllm import register

    register()

__all__ = [
    "BadInput",
    "ConfigurationError",
    "Declined",
    "DeclinedLayerWarning",
    "MoEAlltoAllSeqOverLapDispatcher",
    "MoEDispatcher",
    "MoEDispatcherConfig",
    "MoEPass",
    "MoeFxError",
    "NothingMatched",
    "Options",
    "RankMissing",
    "RanksDiffer",
    "Region",
    "Report",
    "Router",
    "Verification",
    "__version__",
    "clip_grad_norm_",
    "expert_parameter_bytes",
    "explain",
    "full_state_dict",
    "inductor_runtime_estimation",
    "interleave",
    "ops",
    "shard_experts",
    "shards_for_data_parallel",
    "unshard_experts",
]
