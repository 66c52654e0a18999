"""How a region's tokens reach their experts: the decision, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ExchangePlan:
    """The same on every rank but for ``rank``.

    strategy: "local" (one rank: nothing travels), "alltoall" (exact split sizes, one host sync).
    group_name, world_size, rank: the expert-parallel group.
    num_experts, local_experts: rank ``r`` owns experts from ``r * local_experts`` on.
    host_sync: the op that makes the host wait for the device, if any: what stands in the way of
        capturing the graph (CUDA graphs, ACL graphs).
    """

    strategy: str
    num_experts: int
    local_experts: int
    group_name: str = ""
    world_size: int = 1
    rank: int = 0

    @property
    def exchanges(self) -> bool:
        return self.strategy == "alltoall"

    @property
    def first_expert(self) -> int:
        return self.rank * self.local_experts

    @property
    def host_sync(self) -> str:
        return "moe_fx::split_sizes" if self.exchanges else ""
