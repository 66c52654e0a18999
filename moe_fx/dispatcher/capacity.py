"""Room for so many pairs an expert: which pairs are kept, and where they go if rows are padded.

The rule: of one rank's pairs an expert keeps the ``capacity`` that weigh most, of equal ones the
earlier token's (Megatron-LM's drop policy "probs"). It never depends on another rank's tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kept_keys", "padded_slots"]


def kept_keys(ids: Tensor, probs: Tensor, num_experts: int, capacity: int) -> Tensor:
    """``[T, K]``: each pair's expert, ``num_experts`` for those dropped. ``ids``: in range."""
    places = _places(ids, probs, num_experts)
    return torch.where(places < capacity, ids, num_experts)


def padded_slots(ids: Tensor, probs: Tensor, num_experts: int, capacity: int) -> Tensor:
    """``[T * K]`` int32: each pair's row in a buffer of ``capacity`` rows an expert, behind its end
    for those dropped."""
    places = _places(ids, probs, num_experts)
    slots = torch.where(places < capacity, ids * capacity + places, num_experts * capacity)
    return slots.reshape(-1).to(torch.int32)


def _places(ids: Tensor, probs: Tensor, num_experts: int) -> Tensor:
    """``[T, K]``: how many pairs of its expert go before each."""
    flat = ids.reshape(-1).long()
    by_weight = torch.argsort(probs.detach().reshape(-1), descending=True, stable=True)
    order = by_weight[torch.argsort(flat[by_weight], stable=True)]
    counts = torch.zeros(num_experts, dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(0, flat, torch.ones_like(flat))
    starts = (counts.cumsum(0) - counts)[flat[order]]
    positions = torch.arange(flat.numel(), device=ids.device) - starts
    return torch.empty_like(flat).scatter(0, order, positions).view(ids.shape)
