"""How a dialect op is defined: one schema, one kernel for every device, a fake kernel, autograd."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.library import Library, impl, register_autograd, register_fake

from moe_fx.compat import autocast_off

NAMESPACE = "moe_fx"
_LIBRARY = Library(NAMESPACE, "DEF")
_DEVICE_KEYS = ("CPU", "CUDA", "PrivateUse1")
_own: dict[tuple[str, str], Callable[..., Any]] = {}
"""Kernels that devices bring, by op and dispatch key."""


def define(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., None] | None = None,
    any_layout: bool = False,
) -> None:
    """Register ``moe_fx::<schema>``.

    ``kernel`` is written in ATen calls and so serves CPU, CUDA and out-of-tree devices alike;
    an op with a device-specific implementation gets it from the lowering pass instead, or by
    `bring`. It computes
    in the dtypes of its arguments, whatever the caller's autocast (backward passes run under it).
    ``any_layout``: Inductor may pass tensors of any strides, and so need not copy them.
    """
    name = schema.split("(", 1)[0]
    tags = (torch.Tag.pt2_compliant_tag,)
    _LIBRARY.define(schema, tags=(*tags, torch.Tag.flexible_layout) if any_layout else tags)
    qualname = f"{NAMESPACE}::{name}"
    for key in _DEVICE_KEYS:
        impl(qualname, key, _without_autocast(name, key, kernel), lib=_LIBRARY)
    register_fake(qualname, fake, lib=_LIBRARY)
    if backward is not None:
        register_autograd(qualname, backward, setup_context=setup_context, lib=_LIBRARY)


def bring(op: str, key: str, kernel: Callable[..., Any]) -> None:
    """From now on ``kernel`` is what ``moe_fx::<op>`` runs on devices of that dispatch key. Of the
    caller's autocast it takes care itself."""
    _own[op, key] = kernel


def _without_autocast(name: str, key: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(kernel)
    def run(*args: Any, **kwargs: Any) -> Any:
        own = _own.get((name, key))
        if own is not None:
            return own(*args, **kwargs)
        with autocast_off():
            return kernel(*args, **kwargs)

    return run


def define_composite(schema: str, function: Callable[..., Any]) -> None:
    """Register an op that is nothing but its ATen definition: autograd and fakes follow from it,
    and a compiler that does not know the op decomposes it."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    impl(f"{NAMESPACE}::{name}", "CompositeImplicitAutograd", function, lib=_LIBRARY)
