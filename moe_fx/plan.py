"""How a region's tokens reach their experts: the decision, as data."""

from __future__ import annotations

from dataclasses import dataclass

from moe_fx.blocks import block_of

PADDED = ("allgather", "padded_alltoall")
"""Strategies with buffers of fixed size, which may be given a capacity."""
EVEN = (*PADDED, "mc2")
"""Strategies of equal parts, which take the same number of tokens on every rank."""


LEAST_ROWS = 64
"""Of an expert, below which a matrix product takes hardly less time."""


def slices(local_experts: int, chunks: int) -> tuple[int, int]:
    """(expert slices, token slices) for about ``chunks`` chunks, at most: by expert as far as the
    local experts divide evenly, then by token."""
    by_expert = max(
        n for n in range(1, local_experts + 1) if local_experts % n == 0 and n <= chunks
    )
    return by_expert, (chunks // by_expert if by_expert == local_experts else 1)


@dataclass(frozen=True)
class Span:
    """What one of "compute", "wait" (both of the compute thread) and "exchange" (of the link) does
    from ``start`` to ``end``, in seconds from the layer's begin."""

    lane: str
    start: float
    end: float


@dataclass(frozen=True)
class Weighed:
    """A way to run the layer that was weighed up, and the seconds that it is expected to take."""

    strategy: str
    chunks: int
    seconds: float


@dataclass(frozen=True)
class Predicted:
    """What the cost model expects of a layer, in seconds. seconds: of this plan; compute, exchange:
    each by itself; unoverlapped: of one chunk, waited for at once. timeline: of the forward as
    planned; timeline_unoverlapped: in one chunk. weighed: all that it chose from."""

    seconds: float
    compute: float
    exchange: float
    unoverlapped: float
    timeline: tuple[Span, ...] = ()
    timeline_unoverlapped: tuple[Span, ...] = ()
    weighed: tuple[Weighed, ...] = ()


@dataclass(frozen=True)
class Fused:
    """That a rank's experts are one op, and what it is told of them (`moe_fx.ops.fused`).

    up_first: of two tables for gate and up, the graph multiplies by that of up first. trains: the
    op keeps what its backward reads.
    """

    layout: str
    act: str
    alpha: float = 1.0
    limit: float | None = None
    shift: float = 0.0
    up_first: bool = False
    trains: bool = False


@dataclass(frozen=True)
class ExchangePlan:
    """The same on every rank but for ``rank``.

    strategy: "local" (one rank: nothing travels); "alltoall" (rows go to their experts' ranks, in
        exact split sizes, one host sync); "padded_alltoall" (the same in equal parts, by capacity);
        "allgather" (every rank gets all tokens, computes its experts' share of each result, and the
        shares are summed where the token is); "direct" (each token goes once to every rank that has
        one of its experts, to a place that both know, and one row comes back); "mc2"
        (Ascend's: one op sends, one fetches and sums);
        "gather_weights" (the weights travel, as captured).
    group_name, world_size, rank: the expert-parallel group.
    num_experts, local_experts: rank ``r`` computes experts from ``r * local_experts`` on. Where
        the ranks do not divide the experts, the last ranks have fewer or none; what exchanges has
        `places` for all alike, and no token goes to those that are left over.
    expert_slices, token_slices: the exchange is cut into chunks, by local experts and by tokens, so
        that it overlaps the experts' compute (`moe_fx.ops.chunks`).
    row_slices: instead, into so many chunks of as many rows each, whatever the routing, the first
        and the last in halves (`moe_fx.ops.cuts`). least_rows: no expert is cut into less.
    capacity_factor, drop: of a strategy with buffers of fixed size (`moe_fx.ops.padded`).
    predicted: what the cost model expects, where it chose (overlap="auto").
    fused: of "local" and "direct", that the experts are one op; None: they are not.
    buffer_bytes: of "direct" on GPUs: of a rank's memory, those that others write to, if every rank
        has as many tokens as this one at capture.
    host_sync: the op that makes the host wait for the device, if any: what stands in the way of
        capturing the graph (CUDA graphs, ACL graphs).
    """

    strategy: str
    num_experts: int
    local_experts: int
    group_name: str = ""
    world_size: int = 1
    rank: int = 0
    expert_slices: int = 1
    token_slices: int = 1
    row_slices: int = 1
    least_rows: int = LEAST_ROWS
    capacity_factor: float | None = None
    drop: bool = False
    predicted: Predicted | None = None
    fused: Fused | None = None
    buffer_bytes: int = 0

    @property
    def places(self) -> int:
        """Numbers of experts, as ops that exchange know them."""
        return self.local_experts * self.world_size if self.exchanges else self.num_experts

    @property
    def exchanges(self) -> bool:
        """Whether tokens travel."""
        return self.strategy not in ("local", "gather_weights")

    @property
    def even(self) -> bool:
        """Whether all ranks must have the same number of tokens."""
        return self.strategy in EVEN

    @property
    def host_sync(self) -> str:
        if self.strategy != "alltoall":
            return ""
        return "moe_fx::cut_rows" if self.row_slices > 1 else "moe_fx::split_sizes"

    @property
    def capture(self) -> str:
        """The verdict, for people."""
        if self.host_sync:
            return f"not capture-safe: {self.host_sync} waits for the device"
        return "capture-safe: no host sync"

    @property
    def summary(self) -> str:
        """For people: what is done, and what it is expected to take."""
        if self.strategy == "local":
            return self.strategy if self.fused is None else f"{self.strategy}, fused"
        most = " at most" * (self.exchanges and self.places > self.num_experts)
        text = f"{self.strategy}, {self.world_size} ranks of {self.local_experts} experts{most}"
        text += ", fused" * (self.fused is not None)
        if self.capacity_factor is not None:
            text += f", capacity factor {self.capacity_factor:g}" + ", drops" * self.drop
        if self.chunks > 1:
            text += f", in {self.chunks} chunks"
        if self.buffer_bytes:
            text += f", on GPUs in buffers of {self.buffer_bytes / 2**20:.3g} MiB"
        if self.predicted is not None:
            took, alone = self.predicted.seconds, self.predicted.unoverlapped
            text += f", expected to take {1e3 * took:.3g} ms ({1e3 * alone:.3g} ms in one)"
        return f"{text}; {self.capture}"

    @property
    def chunks(self) -> int:
        return self.expert_slices * self.token_slices * self.row_slices

    @property
    def experts_per_slice(self) -> int:
        return self.local_experts // self.expert_slices

    @property
    def experts(self) -> range:
        """Those that this rank computes."""
        if not self.exchanges:
            return range(self.num_experts)
        return block_of(self.rank, self.num_experts, self.world_size)

    @property
    def first_expert(self) -> int:
        return self.rank * self.local_experts if self.exchanges else 0
