"""`MoEDispatcherConfig`: what a dispatcher is told, by keyword or by builder methods."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_fx.errors import ConfigurationError

__all__ = ["MoEDispatcherConfig"]


@dataclass
class MoEDispatcherConfig:
    """The fields and builder methods of vLLM-Ascend 0.9.1's class, all of them honoured.

    ::

        MoEDispatcherConfig(num_moe_experts=64, num_local_experts=8, moe_router_topk=6)
        MoEDispatcherConfig().set_num_moe_experts(64).set_num_local_experts(8).build()

    num_moe_experts: E, of the layer; 0: ``num_local_experts`` times the ranks of the group.
    num_local_experts: L, of each rank; contiguous from ``rank * L``.
    moe_router_topk, num_groups, group_topk, expert_bias, scaling_factor, is_fused: how
        `MoEDispatcher.route` selects: K experts a token, out of the ``group_topk`` best of
        ``num_groups`` groups; ``expert_bias [E]`` moves the selection and not the weights
        (DeepSeek-V3); ``scaling_factor`` multiplies the weights; ``is_fused``: by one op
        (``moe_fx::route``, which a device may have a kernel for) or by the ATen ops it stands for.
    moe_expert_capacity_factor: an expert takes at most ``ceil(T * K / E * factor)`` of a rank's
        pairs, those that weigh most (ties: the earlier token's). A dropped pair adds nothing to
        its token, which keeps its residual. None: nothing is dropped.
    moe_pad_expert_input_to_capacity: every expert gets exactly so many rows from each rank, the
        missing ones zero.
    moe_grouped_gemm: with a tensor-parallel group, rows have their whole width before the experts
        (gathered along the last dimension), as grouped matmuls need it.
    """

    num_local_experts: int = 0
    num_moe_experts: int = 0
    moe_pad_expert_input_to_capacity: bool = False
    moe_expert_capacity_factor: float | None = None
    moe_router_topk: int = 2
    moe_grouped_gemm: bool = False
    group_topk: int = 0
    num_groups: int = 1
    expert_bias: Tensor | None = None
    scaling_factor: float | None = None
    is_fused: bool = True

    def set_num_local_experts(self, num_local_experts: int) -> MoEDispatcherConfig:
        return self._set(num_local_experts=num_local_experts)

    def set_num_moe_experts(self, num_moe_experts: int) -> MoEDispatcherConfig:
        return self._set(num_moe_experts=num_moe_experts)

    def set_moe_pad_expert_input_to_capacity(
        self, moe_pad_expert_input_to_capacity: bool
    ) -> MoEDispatcherConfig:
        return self._set(moe_pad_expert_input_to_capacity=moe_pad_expert_input_to_capacity)

    def set_moe_expert_capacity_factor(
        self, moe_expert_capacity_factor: float | None
    ) -> MoEDispatcherConfig:
        return self._set(moe_expert_capacity_factor=moe_expert_capacity_factor)

    def set_moe_router_topk(self, moe_router_topk: int) -> MoEDispatcherConfig:
        return self._set(moe_router_topk=moe_router_topk)

    def set_moe_grouped_gemm(self, moe_grouped_gemm: bool) -> MoEDispatcherConfig:
        return self._set(moe_grouped_gemm=moe_grouped_gemm)

    def set_group_topk(self, group_topk: int) -> MoEDispatcherConfig:
        return self._set(group_topk=group_topk)

    def set_num_groups(self, num_groups: int) -> MoEDispatcherConfig:
        return self._set(num_groups=num_groups)

    def set_expert_bias(self, expert_bias: Tensor | None) -> MoEDispatcherConfig:
        return self._set(expert_bias=expert_bias)

    def set_scaling_factor(self, scaling_factor: float | None) -> MoEDispatcherConfig:
        return self._set(scaling_factor=scaling_factor)

    def set_is_fused(self, is_fused: bool) -> MoEDispatcherConfig:
        return self._set(is_fused=is_fused)

    def _set(self, **fields: Any) -> MoEDispatcherConfig:
        for name, value in fields.items():
            setattr(self, name, value)
        return self

    def build(self) -> MoEDispatcherConfig:
        """Itself, checked as far as it can be without a group."""
        self.check()
        return self

    def check(self, ep_size: int | None = None) -> None:
        """Raise `ConfigurationError` if fields contradict each other, or a group of ``ep_size``."""
        local, experts = self.num_local_experts, self.num_moe_experts
        if local < 1:
            raise _unusable("num_local_experts", local, "at least one expert on every rank")
        if ep_size is not None and experts and experts != local * ep_size:
            raise _unusable(
                "num_moe_experts",
                experts,
                f"num_local_experts * ep_size = {local} * {ep_size} = {local * ep_size}",
            )
        if self.moe_router_topk < 1:
            raise _unusable("moe_router_topk", self.moe_router_topk, "at least 1")
        total = experts or local * (ep_size or 0)
        if total:
            self._check_groups(total)
            if self.expert_bias is not None and self.expert_bias.shape != (total,):
                raise _unusable("expert_bias", tuple(self.expert_bias.shape), f"shape ({total},)")
        factor = self.moe_expert_capacity_factor
        if factor is not None and not factor > 0:
            raise _unusable("moe_expert_capacity_factor", factor, "a number above 0, or None")
        if self.moe_pad_expert_input_to_capacity and factor is None:
            raise _unusable(
                "moe_expert_capacity_factor",
                None,
                "a number: moe_pad_expert_input_to_capacity pads to the capacity that it sets",
            )

    def _check_groups(self, experts: int) -> None:
        if self.num_groups < 1 or experts % self.num_groups:
            raise _unusable("num_groups", self.num_groups, f"a divisor of {experts} experts")
        if self.num_groups == 1:
            return
        if not 1 <= self.group_topk <= self.num_groups:
            raise _unusable("group_topk", self.group_topk, f"1 to {self.num_groups} groups")
        reachable = self.group_topk * (experts // self.num_groups)
        if self.moe_router_topk > reachable:
            raise _unusable(
                "moe_router_topk",
                self.moe_router_topk,
                f"at most the {reachable} experts of {self.group_topk} groups",
            )

    def capacity(self, num_pairs: int, num_experts: int) -> int:
        """Pairs of one rank that an expert takes; all of them without a capacity factor."""
        if self.moe_expert_capacity_factor is None:
            return num_pairs
        return math.ceil(num_pairs / num_experts * self.moe_expert_capacity_factor)


def _unusable(field: str, value: Any, expected: str) -> ConfigurationError:
    return ConfigurationError(f"MoEDispatcherConfig: {field} is {value!r}; expected {expected}.")
