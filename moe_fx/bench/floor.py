"""The time that no program of a layer can beat on this card: the longer of two.

The FLOPs that the routed tokens need, at the rate of a large matrix product; the bytes that must be
read and written once, at the rate of a large copy. Both rates are measured in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

import torch

from moe_fx.bench.machine import Machine

_REPEATS = 20


@dataclass(frozen=True)
class Rates:
    """flops: a second, of a large bf16 matrix product. bytes: a second, read and written, of a
    large copy."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Work:
    """What a layer must do.

    row_flops: of one expert on one row. expert_bytes: weights of one expert. dense_flops: of what
    every token goes through, for one (router, shared expert); dense_bytes: its weights.
    token_bytes: of one token's row.
    """

    row_flops: int
    expert_bytes: int
    dense_flops: int
    dense_bytes: int
    token_bytes: int

    def flops(self, tokens: int, top_k: int) -> int:
        return tokens * (top_k * self.row_flops + self.dense_flops)

    def weight_bytes(self, hit: int) -> int:
        """hit: experts that got a token."""
        return hit * self.expert_bytes + self.dense_bytes

    def floor(
        self, tokens: int, top_k: int, hit: int, rates: Rates, training: bool = False
    ) -> tuple[float, float]:
        """(seconds of FLOPs, seconds of bytes). Training: three products in place of one, weights
        read twice and their gradients written once, four rows a token in place of two."""
        products, weights, rows = (3, 3, 4) if training else (1, 1, 2)
        moved = weights * self.weight_bytes(hit) + rows * tokens * self.token_bytes
        return products * self.flops(tokens, top_k) / rates.flops, moved / rates.bytes


def measured(machine: Machine) -> Rates:
    """On random data: a product of zeros can be faster than any real one."""
    n, device = machine.matmul_size, machine.device
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randint(256, (machine.copy_bytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    seconds = {}
    for name, call in (("product", lambda: a @ b), ("copy", lambda: target.copy_(source))):
        machine.samples(call, 3)
        seconds[name] = median(machine.samples(call, _REPEATS))
    return Rates(2 * n**3 / seconds["product"], 2 * machine.copy_bytes / seconds["copy"])
