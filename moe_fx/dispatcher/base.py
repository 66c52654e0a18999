"""`MoEDispatcher`: a configuration, its groups, shared experts, and the selection of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fx.dispatcher.config import MoEDispatcherConfig
from moe_fx.errors import ConfigurationError
from moe_fx.ops.routing import gating_top_k
from moe_fx.ranks.groups import require_group
from moe_fx.ranks.waiting import TIMEOUT

__all__ = ["MoEDispatcher"]

_SCORES = ("softmax", "sigmoid", "topk_softmax")


class MoEDispatcher:
    """ep_group: ranks that own the experts together; without one the default group if
    `torch.distributed` is initialised, else this process alone. tp_ep_group: ranks that share the
    tokens of a sequence and split every expert's width; at most one. agree_timeout: seconds that a
    rank waits, before the group's first exchange, for all others to come to theirs;
    exchange_timeout: in every exchange, before it is `RankMissing`."""

    def __init__(
        self,
        config: MoEDispatcherConfig,
        ep_group: dist.ProcessGroup | None = None,
        tp_ep_group: dist.ProcessGroup | None = None,
        agree_timeout: float = 300.0,
        exchange_timeout: float = TIMEOUT,
    ) -> None:
        self.config, self.agree_timeout = config, agree_timeout
        self.exchange_timeout = exchange_timeout
        self.shared_experts: Callable[[Tensor], Any] | None = None
        if ep_group is None and dist.is_available() and dist.is_initialized():
            ep_group = dist.group.WORLD
        self._ep_group = None if ep_group is None else require_group(ep_group)
        self._tp_ep_group = None if tp_ep_group is None else require_group(tp_ep_group)
        # Numbers, since a compiler that traces the dispatcher cannot ask a group.
        self._ep_size = 1 if self._ep_group is None else self._ep_group.size()
        self._ep_rank = 0 if self._ep_group is None else self._ep_group.rank()
        self.ep_group_name = "" if self._ep_group is None else self._ep_group.group_name
        config.check(self._ep_size)

    def set_shared_experts(self, shared_experts: Callable[[Tensor], Any] | None) -> None:
        """Called with the tokens, by `token_permutation`, while rows travel. Of a tuple, the first
        is its result."""
        self.shared_experts = shared_experts

    @property
    def ep_group(self) -> dist.ProcessGroup | None:
        return self._ep_group

    @property
    def ep_rank(self) -> int:
        return self._ep_rank

    @property
    def ep_size(self) -> int:
        return self._ep_size

    @property
    def tp_ep_group(self) -> dist.ProcessGroup | None:
        return self._tp_ep_group

    @property
    def tp_ep_size(self) -> int:
        return 1 if self._tp_ep_group is None else self._tp_ep_group.size()

    @property
    def num_experts(self) -> int:
        """E, of all ranks."""
        return self.config.num_moe_experts or self.config.num_local_experts * self.ep_size

    def route(
        self, logits: Tensor, score: str = "softmax", renormalise: bool = False
    ) -> tuple[Tensor, Tensor]:
        """``logits [T, E]`` to ``(probs [T, K] float32, routing_map [T, K] int64)``, by the
        configuration's routing fields. score: "softmax" or "sigmoid" over the experts, or
        "topk_softmax", over the selected only; renormalise: a token's weights add up to 1, times
        ``scaling_factor``."""
        config = self.config
        if logits.dim() != 2 or logits.shape[1] != self.num_experts:
            raise ConfigurationError(
                f"route: logits of shape {tuple(logits.shape)}; expected "
                f"[tokens, {self.num_experts} experts]"
            )
        if score not in _SCORES:
            raise ConfigurationError(f"route: score={score!r}; expected one of {_SCORES}")
        if config.moe_router_topk > self.num_experts:
            raise ConfigurationError(
                f"route: moe_router_topk is {config.moe_router_topk}, the layer has "
                f"{self.num_experts} experts"
            )
        # A compiler fuses the ATen ops itself, and the passes read the selection from them.
        fused = config.is_fused and not torch.compiler.is_compiling()
        gate = torch.ops.moe_fx.route if fused else gating_top_k
        scale = 1.0 if config.scaling_factor is None else config.scaling_factor
        return gate(
            logits,
            config.moe_router_topk,
            score,
            config.expert_bias,
            config.num_groups,
            max(1, config.group_topk),
            "max" if config.expert_bias is None else "top2",
            renormalise,
            0.0,
            scale,
        )
