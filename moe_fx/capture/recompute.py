"""What a checkpointed body computes again in backward, and what it keeps from forward.

Everything is computed again but for what decides where rows go: the selected experts, the counts
that ranks told each other, the sizes on the host. They are small. Were they computed again, a
selection that is a tie but for rounding could come out otherwise in backward, and rows would travel
by the counts of another routing.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from moe_fx.compat import SelectiveForward, is_traced
from moe_fx.ops._define import define
from moe_fx.sources import SOURCES

ops = torch.ops.moe_fx

_CONTEXT = "_checkpoint_context_fn"
"""Where torch finds, in the ``meta`` of a body, the ``context_fn`` of the checkpoint."""


def keep_routing(body: GraphModule, given: Callable[[], Any] | None) -> None:
    """Let a checkpoint of ``body`` keep its routing, besides what ``given``, the model's own
    ``context_fn``, says."""
    body.meta[_CONTEXT] = _Contexts(given)


def given_contexts(body: GraphModule) -> Callable[[], Any] | None:
    """The ``context_fn`` that the model gave for this checkpoint."""
    return body.meta.get(_CONTEXT)


def remember(ids: Node) -> Node:
    """Make every reader of ``ids`` read those of the forward, in backward too."""
    with ids.graph.inserting_after(ids):
        remembered = ids.graph.call_function(ops.remember.default, (ids,))
    remembered.meta = dict(ids.meta)
    ids.replace_all_uses_with(
        remembered, delete_user_cb=lambda user: user is not remembered, propagate_meta=False
    )
    return remembered


class _Contexts:
    """The ``context_fn``: it makes the two contexts in which forward and recomputation run."""

    def __init__(self, given: Callable[[], Any] | None) -> None:
        self.given = given
        # AOT's cache asks for it; a context_fn of the model's that has none is not cached.
        if given is None or hasattr(given, "cache_hash"):
            self.cache_hash = f"moe_fx {SOURCES} {getattr(given, 'cache_hash', '')}"

    def __call__(self) -> Any:
        if self.given is None:
            forward, again = create_selective_checkpoint_contexts(_policy)
        else:
            forward, again = self.given()
            if isinstance(forward, SelectiveForward):
                forward.policy_fn = partial(_policy, given=forward.policy_fn)
        return forward, again if is_traced() else _Again(again)


class _Again:
    """The context ``own``, with the random numbers drawn that were drawn when this was made.

    For a body that runs as it is: torch lets compilers see to that, and them alone.
    """

    def __init__(self, own: AbstractContextManager[Any]) -> None:
        self.own = own
        self.generators = _generators()
        self.states = _states(self.generators)

    def __enter__(self) -> None:
        self.interrupted = _states(self.generators)
        _set_states(self.generators, self.states)
        self.own.__enter__()

    def __exit__(self, *raised: Any) -> Any:
        try:
            return self.own.__exit__(*raised)
        finally:
            _set_states(self.generators, self.interrupted)


def _generators() -> list[Any]:
    """The modules whose default generators are in use."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return [torch]
    device = torch.get_device_module(accelerator)
    return [torch, device] if device.is_initialized() else [torch]


def _states(generators: list[Any]) -> list[Tensor]:
    return [module.get_rng_state() for module in generators]


def _set_states(generators: list[Any], states: list[Tensor]) -> None:
    for module, state in zip(generators, states, strict=True):
        module.set_rng_state(state)


def _policy(
    context: Any, op: Any, *args: Any, given: Callable[..., Any] | None = None, **kwargs: Any
) -> Any:
    if op in _KEPT:
        return CheckpointPolicy.MUST_SAVE
    if given is None:
        return CheckpointPolicy.PREFER_RECOMPUTE
    return given(context, op, *args, **kwargs)


def _remember(ids: Tensor) -> Tensor:
    return ids.clone()


define("remember(Tensor ids) -> Tensor", _remember, _remember)

_KEPT = frozenset(
    (
        torch.ops.aten.topk.default,
        ops.remember.default,
        ops.exchange_counts.default,
        ops.gather_counts.default,
        ops.split_sizes.default,
        ops.checked_sizes.default,
        ops.cut_rows.default,
        ops.even_sizes.default,
    )
)
