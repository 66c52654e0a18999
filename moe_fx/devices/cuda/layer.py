"""The arguments of ``fused_experts`` on a GPU, and what of them speed depends on."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from moe_fx.devices.cuda.kernels.rows import Places
from moe_fx.ops.fused import split_columns

__all__ = ["TENSORS", "Layer", "Shape", "can_describe", "can_group"]

TENSORS = 9
"""The first of a layer's arguments are."""

_GROUPED_ON = ((9, 0), (10, 0))
"""Compute capabilities where torch's grouped matmul (2.11 to 2.14) does not wait for the GPU:
Hopper and the Blackwells of servers."""
_DESCRIBED_FROM = (9, 0)
_INTERPRETED = 1 << 20


@dataclass(frozen=True)
class Shape:
    """A layer, as far as speed depends on it. k_last: gate and up, down are stored with the summed
    dimension last. described: TMA takes the tables. grouped: torch's grouped matmul takes them.
    shared_memory: bytes that a program may have."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    layout: str
    dtype: str
    k_last: tuple[bool, bool]
    described: bool
    grouped: bool
    shared_memory: int

    @property
    def gated(self) -> bool:
        return self.layout != "single"

    @property
    def joinable(self) -> bool:
        """Descriptors fetch gate and up together."""
        halves = self.layout in ("halves", "halves_up_first") and self.k_last[0]
        return self.described and (halves or self.layout == "interleaved")

    @property
    def alternates(self) -> bool:
        """Columns of gate and up do in memory: descriptors fetch them together only."""
        return self.layout == "interleaved" and not self.k_last[0]


@dataclass
class Layer:
    """The op's arguments, in its schema's order."""

    tokens: Tensor
    ids: Tensor
    weights: Tensor | None
    gate_up: Tensor
    up: Tensor | None
    down: Tensor
    gate_up_bias: Tensor | None
    up_bias: Tensor | None
    down_bias: Tensor | None
    layout: str
    act: str
    alpha: float
    limit: float | None
    shift: float
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.tokens.stride(-1) != 1:
            self.tokens = self.tokens.contiguous()
        self.ids = self.ids.contiguous()
        if self.weights is not None:
            self.weights = self.weights.contiguous()
        if self.down_bias is not None:
            self.down_bias = self.down_bias.contiguous()

    @property
    def top_k(self) -> int:
        return self.ids.shape[1]

    @property
    def experts(self) -> int:
        return self.gate_up.shape[0]

    @property
    def body(self) -> tuple[str, float, float | None, float]:
        return self.act, self.alpha, self.limit, self.shift

    @property
    def sizes(self) -> tuple[int, int]:
        """Of the columns before the activation."""
        return self.ids.numel(), self.places.width * (2 if self.places.gated else 1)

    @cached_property
    def places(self) -> Places:
        return Places.of(self.layout, self.down.shape[1])

    @cached_property
    def halves(self) -> tuple[Tensor, Tensor | None]:
        """Gate's and up's tables ``[E, H, I]``."""
        if self.up is not None:
            return self.gate_up, self.up
        return split_columns(self.gate_up, self.layout)

    @cached_property
    def bias_halves(self) -> tuple[Tensor | None, Tensor | None]:
        if self.up is not None or self.gate_up_bias is None:
            return self.gate_up_bias, self.up_bias
        return split_columns(self.gate_up_bias, self.layout)

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return (
            *(self.tokens, self.weights, self.gate_up, self.up, self.down),
            *(self.gate_up_bias, self.up_bias, self.down_bias),
        )

    @property
    def shape(self) -> Shape:
        tables = [each for each in (self.gate_up, self.up, self.down) if each is not None]
        halves = () if self.layout == "interleaved" else self.halves
        aligned = all(each.data_ptr() % 16 == 0 for each in (*tables, *halves) if each is not None)
        return _shape(
            self.top_k,
            self.layout,
            self.tokens.dtype,
            self.tokens.device,
            aligned,
            *((each.shape, each.stride()) for each in tables),
        )


@functools.lru_cache(maxsize=256)
def _shape(
    top_k: int,
    layout: str,
    dtype: torch.dtype,
    device: torch.device,
    aligned: bool,
    *tables: tuple[Sequence[int], Sequence[int]],
) -> Shape:
    """tables: shapes and strides of gate_up, up if there is one, and down."""
    (experts, hidden, _), gate_strides = tables[0]
    (_, inner, _), down_strides = tables[-1]
    regular = aligned and all(_is_regular(strides, dtype.itemsize) for _, strides in tables)
    capability, shared_memory = _of_device(device)
    return Shape(
        experts=experts,
        top_k=top_k,
        hidden=hidden,
        inner=inner,
        layout=layout,
        dtype=str(dtype).removeprefix("torch."),
        k_last=(gate_strides[1] == 1, down_strides[1] == 1),
        described=regular and capability >= _DESCRIBED_FROM,
        grouped=regular
        and dtype == torch.bfloat16
        and capability in _GROUPED_ON
        and all(width * dtype.itemsize % 16 == 0 for width in (hidden, inner)),
        shared_memory=shared_memory,
    )


@functools.cache
def _of_device(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, bytes of shared memory; on a CPU, what its interpreter does."""
    if device.type != "cuda":
        return _DESCRIBED_FROM, _INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return capability, properties.shared_memory_per_block_optin  # type: ignore[attr-defined]


def _is_regular(strides: Sequence[int], size: int) -> bool:
    """One unit stride among the last two, others of 16 bytes."""
    others = [stride for stride in strides if stride != 1]
    return 1 in strides[-2:] and all(stride * size % 16 == 0 for stride in others)


def can_group(*operands: Tensor) -> bool:
    """Whether torch's grouped matmul takes them here without waiting for the GPU, and lays out what
    comes of it without gaps."""
    first = operands[0]
    if first.dtype != torch.bfloat16 or not first.is_cuda:
        return False
    return _of_device(first.device)[0] in _GROUPED_ON and _are_even(operands)


def can_describe(*operands: Tensor) -> bool:
    """Whether TMA takes them, and what comes of them, in tiles that are worth it."""
    first = operands[0]
    capability, _ = _of_device(first.device)
    return capability >= _DESCRIBED_FROM and first.itemsize == 2 and _are_even(operands)


def _are_even(operands: Sequence[Tensor]) -> bool:
    columns = operands[-1].shape[-1] * operands[-1].itemsize
    return columns % 16 == 0 and all(
        each.data_ptr() % 16 == 0 and _is_regular(each.stride(), each.itemsize) for each in operands
    )
