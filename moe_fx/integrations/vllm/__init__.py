"""vLLM: its MoE layers, opened by a pass in its compiler (docs/vllm.md).

``pip install moe-fx`` beside vLLM, and one configuration key::

    LLM(..., enable_expert_parallel=True, compilation_config={
        "inductor_passes": {"post_grad_custom_post_pass": "moe_fx.vllm_pass"}})

vLLM finds `register` by its entry point ``vllm.general_plugins``, in each of its processes.
"""

from __future__ import annotations

import importlib.util
import logging
import sys

__all__ = ["register"]

log = logging.getLogger("moe_fx")


def register() -> None:
    """Make ``moe_fx.vllm_pass`` what vLLM looks up by name, with the options in the environment
    variable `MOE_FX_VLLM_OPTIONS`, and define the ops of opened layers. Called again it does
    nothing; with a vLLM that has not what the pass needs it says so and does nothing either."""
    moe_fx = sys.modules["moe_fx"]  # it may be half imported: it calls this
    if "vllm_pass" in vars(moe_fx):
        return
    try:
        from moe_fx.integrations.vllm.vllm_pass import VllmMoEPass
    except ImportError as missing:
        log.warning("moe_fx's pass does not fit this vLLM (docs/vllm.md): %s", missing)
        return
    if importlib.util.find_spec("vllm_ascend") is not None:
        from moe_fx.integrations import vllm_ascend

        vllm_ascend.register()
    moe_fx.vllm_pass = VllmMoEPass()  # type: ignore[attr-defined]
