"""What enters an MoE layer besides tokens and weights, and where: masks, maps, other weights.

Each situation is a function of ``(x, w1, w2, gate, *extra)`` around one of the spellings, and
``extra(seed)`` values of what else it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.proofs.layers import (
    EXPERTS,
    HIDDEN,
    SPELLINGS,
    TOKENS,
    TOP_K,
    WIDTH,
    Experts,
    Outcome,
    outcome,
    random,
    route,
    weights,
)

MASK_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bool, torch.int64, torch.int32, torch.int8, torch.uint8, torch.float32)
}


@dataclass(frozen=True)
class Situation:
    function: Callable[..., Tensor]
    extra: Callable[[int], tuple[Tensor, ...]]

    def outcome(self, spelling: str, **how: Any) -> Outcome:
        matrices, experts = weights(), SPELLINGS[spelling]

        def layer(x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor, *extra: Tensor) -> Tensor:
            return self.function(experts, x, w1, w2, gate, *extra)

        def values(seed: int) -> tuple[Tensor, ...]:
            x = random(TOKENS, HIDDEN, seed=100 + seed)
            return (x, matrices["w1"], matrices["w2"], matrices["gate"], *self.extra(seed))

        return outcome(layer, values(0), values, **how)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# -- masks of tokens -------------------------------------------------------------------------------


def mask(dtype: torch.dtype, seed: int) -> Tensor:
    kept = torch.rand(TOKENS, generator=_generator(seed)) > 0.4
    kept[seed % TOKENS], kept[(seed + 1) % TOKENS] = False, True
    return kept.to(dtype)


Place = Callable[[Tensor, Tensor], Tensor]


def _masked(value: Tensor, of: Tensor, otherwise: float = 0.0) -> Tensor:
    return value.masked_fill((of == 0)[:, None], otherwise)


MASKS: dict[str, dict[str, Place]] = {
    "logits filled": {"logits": lambda v, m: _masked(v, m)},
    "weights multiplied": {"weights": lambda v, m: v * m[:, None]},
    "weights filled": {"weights": lambda v, m: _masked(v, m)},
    "weights chosen": {"weights": lambda v, m: torch.where((m != 0)[:, None], v, v * 0.5)},
    "ids to the first": {"ids": lambda v, m: v.masked_fill((m == 0)[:, None], 0)},
    "ids shifted": {"ids": lambda v, m: (v + m[:, None].long()) % EXPERTS},
    "tokens multiplied": {"tokens": lambda v, m: v * m[:, None]},
    "tokens filled": {"tokens": lambda v, m: _masked(v, m)},
    "result multiplied": {"result": lambda v, m: v * m[:, None]},
}
NO_EXPERT: dict[str, Place] = {
    "-1": lambda v, m: v.masked_fill((m == 0)[:, None], -1),
    "one beyond": lambda v, m: v.masked_fill((m == 0)[:, None], EXPERTS),
}


def masked_by(dtype: torch.dtype, **places: Place) -> Situation:
    def same(value: Tensor, of: Tensor) -> Tensor:
        return value

    def function(
        experts: Experts, x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor, of: Tensor
    ) -> Tensor:
        logits = places.get("logits", same)(x @ gate.t(), of)
        w, ids = torch.softmax(logits, -1).topk(TOP_K)
        w, ids = places.get("weights", same)(w, of), places.get("ids", same)(ids, of)
        return places.get("result", same)(
            experts(places.get("tokens", same)(x, of), w, ids, w1, w2), of
        )

    return Situation(function, lambda seed: (mask(dtype, seed),))


# -- other inputs ----------------------------------------------------------------------------------


def _on_weights(scale: Callable[..., Tensor], extra: Callable[[int], Tensor]) -> Situation:
    def function(
        experts: Experts, x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor, of: Tensor
    ) -> Tensor:
        w, ids = route(x, gate)
        return experts(x, scale(w, ids, of), ids, w1, w2)

    return Situation(function, lambda seed: (extra(seed),))


def _on_ids(change: Callable[..., Tensor], extra: Callable[[int], Tensor]) -> Situation:
    def function(
        experts: Experts, x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor, of: Tensor
    ) -> Tensor:
        w, ids = route(x, gate)
        return experts(x, w, change(ids, of), w1, w2)

    return Situation(function, lambda seed: (extra(seed),))


def _on_table(
    change: Callable[..., Tensor], extra: Callable[[int], tuple[Tensor, ...]]
) -> Situation:
    """change: ``(w1, *extra) -> w1``."""

    def function(
        experts: Experts, x: Tensor, w1: Tensor, w2: Tensor, gate: Tensor, *of: Tensor
    ) -> Tensor:
        w, ids = route(x, gate)
        return experts(x, w, ids, change(w1, *of), w2)

    return Situation(function, extra)


def _integers(low: int, high: int, *sizes: int, dtype: torch.dtype = torch.int64) -> Any:
    return lambda seed: torch.randint(low, high, sizes, generator=_generator(seed)).to(dtype)


def _capacity(w: Tensor, ids: Tensor, room: Tensor) -> Tensor:
    """Only the first ``room`` tokens of each expert count."""
    place = F.one_hot(ids, EXPERTS).sum(1).cumsum(0).gather(1, ids)
    return w * (place <= room)


SITUATIONS: dict[str, Situation] = {
    "an integer scale per expert": _on_weights(
        lambda w, ids, s: w * s[ids], _integers(1, 5, EXPERTS)
    ),
    "an integer scale": _on_weights(lambda w, ids, s: w * s, lambda seed: torch.tensor(3 + seed)),
    "a switch": _on_weights(
        lambda w, ids, on: torch.where(on, w, w * 2), lambda seed: torch.tensor(seed % 2 == 0)
    ),
    "a length": _on_weights(
        lambda w, ids, length: w * (torch.arange(TOKENS) < length)[:, None],
        lambda seed: torch.tensor(7 - seed % 5),
    ),
    "a length behind all tokens": _on_weights(
        lambda w, ids, length: w * (torch.arange(TOKENS) < length)[:, None],
        lambda seed: torch.tensor(TOKENS + seed % 3 * TOKENS),
    ),
    "a capacity": _on_weights(_capacity, lambda seed: torch.tensor(3 + seed % 3)),
    "ids shifted by an input": _on_ids(
        lambda ids, by: (ids + by) % EXPERTS, lambda seed: torch.tensor(1 + seed % 3)
    ),
    "ids of some tokens turned over": _on_ids(
        lambda ids, of: torch.where(of[:, None], ids, EXPERTS - 1 - ids),
        lambda seed: mask(torch.bool, seed),
    ),
    "a table pruned by a mask": _on_table(
        lambda w1, keep: w1 * keep,
        lambda seed: (torch.rand(EXPERTS, HIDDEN, WIDTH, generator=_generator(seed)) > 0.5,),
    ),
    "experts switched off": _on_table(
        lambda w1, on: w1 * on[:, None, None],
        lambda seed: (torch.tensor([1, 0, 1, 1]) if seed % 2 else torch.tensor([1, 1, 0, 1]),),
    ),
    "low-rank updates": _on_table(
        lambda w1, a, b: w1 + torch.bmm(a, b),
        lambda seed: (random(EXPERTS, HIDDEN, 3, seed=seed), random(EXPERTS, 3, WIDTH, seed=seed)),
    ),
    "int8 with a scale": _on_table(
        lambda w1, q, scale: q.float() * scale,
        lambda seed: (
            _integers(-128, 128, EXPERTS, HIDDEN, WIDTH, dtype=torch.int8)(seed),
            random(EXPERTS, 1, WIDTH, seed=seed).abs() / 127,
        ),
    ),
    "uint8 with a zero point": _on_table(
        lambda w1, q, scale, zero: (q.float() - zero.float()) * scale,
        lambda seed: (
            _integers(0, 256, EXPERTS, HIDDEN, WIDTH, dtype=torch.uint8)(seed),
            random(EXPERTS, 1, WIDTH, seed=seed).abs() / 127,
            _integers(0, 256, EXPERTS, 1, WIDTH, dtype=torch.uint8)(seed + 1),
        ),
    ),
    "int4, two in a byte": _on_table(
        lambda w1, q, scale: (torch.stack([q & 15, q >> 4], -1).flatten(2).float() - 8) * scale,
        lambda seed: (
            _integers(0, 256, EXPERTS, HIDDEN, WIDTH // 2, dtype=torch.uint8)(seed),
            random(EXPERTS, HIDDEN, 1, seed=seed).abs() / 8,
        ),
    ),
    "float8 kept as bytes": _on_table(
        lambda w1, q: q.view(torch.float8_e4m3fn).float(),
        lambda seed: (
            random(EXPERTS, HIDDEN, WIDTH, seed=seed).to(torch.float8_e4m3fn).view(torch.uint8),
        ),
    ),
    "float8 with a scale": _on_table(
        lambda w1, q, scale: q.float() * scale,
        lambda seed: (
            random(EXPERTS, HIDDEN, WIDTH, seed=seed).to(torch.float8_e4m3fn),
            random(EXPERTS, 1, 1, seed=seed).abs() + 0.1,
        ),
    ),
}

MAPS_WITH_NO_EXPERT: dict[str, Situation] = {
    "a map with -1": _on_ids(
        lambda ids, to: to[ids],
        lambda seed: torch.tensor([0, -1, 2, -1] if seed % 2 == 0 else [-1, 1, 0, -1]),
    ),
    "ids behind a length": _on_ids(
        lambda ids, length: ids.masked_fill((torch.arange(TOKENS) >= length)[:, None], -1),
        lambda seed: torch.tensor(7 - seed % 5),
    ),
}
