"""The record of a look-alike, and its seeded parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

TOKENS, HIDDEN, ENTRIES, TOP_K = 22, 32, 8, 2


@dataclass(frozen=True)
class LookAlike:
    """A program that selects the best of something and is no MoE layer, or an odd one.

    build: the module, with the same weights on every call. reason: words of the refusal ("": it
    need not be refused: nothing is selected, or it is ``legal``). legal: an expert computation all
    the same, so that a rewrite is right if it gives the same values; otherwise it must stay as it
    is. random: draws numbers, so that runs compare under one seed.
    """

    build: Callable[[], nn.Module]
    reason: str = ""
    input_shape: tuple[int, ...] = (TOKENS, HIDDEN)
    legal: bool = False
    random: bool = False

    @property
    def name(self) -> str:
        return str(getattr(self.build, "__name__", self.build))


class Module(nn.Module):
    """Declares parameters and constants by shape, from one seed."""

    def __init__(self, **sizes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, size in sizes.items():
            value = torch.randn(size, generator=generator) / size[-1] ** 0.5
            self.register_parameter(name, nn.Parameter(value))

    def constant(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value)
        value.is_buffer = True  # type: ignore[attr-defined]
