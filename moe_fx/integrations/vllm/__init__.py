"""vLLM: its MoE layers, opened by a pass in its compiler (docs/vllm.md).

``pip install moe-fx`` beside vLLM, and one configuration key::

    LLM(..., enable_expert_parallel=True, compilation_config={
        "inductor_passes": {"post_grad_custom_post_pass": "moe_fx.vllm_pass"}})

vLLM finds `register` by its entry point ``vllm.general_plugins``, in each of its processes.
"""

from __future__ import annotations

import importlib.util

__all__ = ["register"]


def register() -> None:
    """Make ``moe_fx.vllm_pass`` what vLLM looks up by name, with the options in the environment
    variable `ENVIRONMENT`, and define the ops of opened layers. Called again it does nothing."""
    import moe_fx

    if "vllm_pass" in vars(moe_fx):
        return
    from moe_fx.integrations.vllm.vllm_pass import VllmMoEPass

    if importlib.util.find_spec("vllm_ascend") is not None:
        from moe_fx.integrations import vllm_ascend

        vllm_ascend.register()
    moe_fx.vllm_pass = VllmMoEPass()  # type: ignore[attr-defined]
