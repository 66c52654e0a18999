"""transformers: its ``ep_implementation="moe_fx"`` (`expert_parallel.py`), and `sharded_loading`
(`moe_fx/weights/pretrained.py`).

Which releases it has been run on: `moe_fx.supported`.
"""

from __future__ import annotations

import transformers

from moe_fx.integrations.expert_parallel import register
from moe_fx.supported import check_transformers
from moe_fx.weights.pretrained import sharded_loading

__all__ = ["sharded_loading"]

check_transformers(transformers.__version__)
register()
