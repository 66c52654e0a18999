"""Analysis in the same surroundings whoever compiles: what torch does to ops by the way is off.

Proofs run ops on real tensors, and differentiate them, inside the user's call of the compiled
model: under the caller's saved-tensor hooks (activation checkpointing), autocast, inference mode,
function transforms, tensor modes, anomaly detection and so on. Proofs that see any of these prove
something else, and what they do may disturb the caller: checkpointing counts the tensors that are
saved, and a random op of a trial would move the caller's random stream.

Contract. Within `neutral` ops compute what they compute at the start of a process, and afterwards
everything is as it was. What a captured graph means stays as it is: the default dtype, which
decides what ``integers * 0.5`` gives; and, as nobody's results depend on them, numbers of threads.
Random ops draw from a stream of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from moe_fx.compat import (
    autocast_off,
    no_compiled_autograd,
    no_function_modes,
    no_transforms,
    real_tensors,
    saved_tensor_hooks_active,
    set_deterministic,
)

__all__ = ["neutral"]

_SEED = 0


@contextmanager
def neutral() -> Iterator[None]:
    """No mode, hook, transform or switch of the caller acts on ops within. Gradients are off; what
    differentiates switches them on."""
    with ExitStack() as stack:
        stack.enter_context(no_transforms())
        stack.enter_context(no_function_modes())
        stack.enter_context(real_tensors())
        stack.enter_context(autocast_off())
        stack.enter_context(no_compiled_autograd())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        if saved_tensor_hooks_active():
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(_same, _same))
        stack.enter_context(_any_algorithm())
        stack.enter_context(_exact_products())
        stack.enter_context(_own_random_stream())
        yield


def _same(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def _any_algorithm() -> Iterator[None]:
    """Ops that have no deterministic implementation may run."""
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    set_deterministic(False, warn_only)
    try:
        yield
    finally:
        set_deterministic(True, warn_only)


@contextmanager
def _exact_products() -> Iterator[None]:
    """Matmuls of float32 on the host are done in float32, whatever
    `torch.set_float32_matmul_precision` allows."""
    matmul = cast(Any, torch.backends.mkldnn).matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextmanager
def _own_random_stream() -> Iterator[None]:
    """Of the host, where proofs run."""
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(_SEED)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
