"""How far a result is from the same mathematics in float64.

A router that works in bfloat16 often has two experts that are equal to its last bit; which of them
is selected hangs on rounding, and either is right. So only tokens are compared whose selection
stays the same when they are changed by a per cent.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from moe_fx.bench.layers import Block
from moe_fx.bench.machine import Machine
from moe_fx.errors import MoeFxError

MOST_ROWS = 64
"""Tokens that are computed in float64."""
TOLERANCE = 2e-2
"""A result is right if it is no further from float64 than this, or than twice as far as what it is
compared with. bf16 is 1e-3 to 1e-2 away."""
_CHANGE, _CHANGES = 0.01, 24
_DRAWS = 50


def steady(block: Block, tokens: Tensor) -> Tensor:
    """``[T]``, bool: whether a token's experts stay the same if it is changed a little."""
    expected = block.selected(tokens).sort(-1).values
    same = torch.ones(expected.shape[0], dtype=torch.bool, device=expected.device)
    for _ in range(_CHANGES):
        changed = tokens * (1 + _CHANGE * torch.randn_like(tokens))
        same &= (block.selected(changed).sort(-1).values == expected).all(-1)
    return same


def draw(block: Block, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Fill ``tokens`` with new ones. Returns which of them are `steady`, and the indices of at most
    `MOST_ROWS` of those, from all over. `MoeFxError` if there never is one."""
    for _ in range(_DRAWS):
        with torch.no_grad():
            tokens.copy_(torch.randn_like(tokens))
        same = steady(block, tokens.detach())
        rows = same.nonzero()[:, 0]
        if len(rows):
            chosen = torch.randperm(len(rows), device=rows.device)[:MOST_ROWS]
            return same, rows[chosen].sort().values
    raise MoeFxError("No token selects its experts by more than rounding: nothing to compare.")


class InFloat64:
    """The block in float64, experts one by one; on the host if the card has no room."""

    def __init__(self, block: Block, machine: Machine) -> None:
        held = sum(p.numel() for p in block.module.parameters())
        fits = machine.free_bytes() > 1.2 * 8 * held + 3 * 2**30
        self.module = copy.deepcopy(block.module).to(
            machine.device if fits else "cpu", torch.float64
        )
        for module in self.module.modules():
            config = getattr(module, "config", None)
            if config is not None:
                config._experts_implementation = "eager"

    def forward(self, tokens: Tensor) -> Tensor:
        """``[1, n, hidden]`` -> the same shape, on the device of ``tokens``."""
        with torch.no_grad():
            return first(self.module(self._take(tokens))).to(tokens.device)

    def gradients(self, tokens: Tensor, output: Tensor) -> dict[str, Tensor]:
        """Of the tokens ("tokens") and of every parameter, for the result's gradient ``output``."""
        self.module.requires_grad_(True)
        given = self._take(tokens).requires_grad_(True)
        leaves = leaves_of(self.module, given)
        found = torch.autograd.grad(
            first(self.module(given)), list(leaves.values()), self._take(output), allow_unused=True
        )
        self.module.requires_grad_(False)
        return {name: g for name, g in zip(leaves, found, strict=True) if g is not None}

    def _take(self, tensor: Tensor) -> Tensor:
        where = next(self.module.parameters()).device
        return tensor.detach().to(where, torch.float64, copy=True)


def leaves_of(module: nn.Module, tokens: Tensor) -> dict[str, Tensor]:
    """What gradients are taken of, by name."""
    return {"tokens": tokens, **dict(module.named_parameters())}


def first(result: object) -> Tensor:
    """A block's result: some return what their router said beside it."""
    found = result[0] if isinstance(result, (tuple, list)) else result
    assert isinstance(found, Tensor)
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖. Infinite if anything found is not finite, or if it should be
    zero and is not."""
    if not bool(torch.isfinite(found).all()):
        return float("inf")
    expected = expected.to(found.device, torch.float64)
    distance, size = (found.double() - expected).norm(), expected.norm()
    if not size:
        return float("inf") if distance else 0.0
    return float(distance / size)
