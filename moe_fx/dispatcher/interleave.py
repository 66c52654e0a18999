"""Several micro-batches at once: while one's rows travel, another computes."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

__all__ = ["interleave"]

T = TypeVar("T")


def interleave(*micro_batches: Generator[None, None, T]) -> list[T]:
    """Run generators in turn, each up to where its rows travel; their results, in order.

    ::

        def layer(x):
            h = x + attention(x)
            probs, ids = dispatcher.route(gate(h))
            return h + (yield from dispatcher.steps(h, probs, ids, experts))

        first, second = interleave(layer(x[:half]), layer(x[half:]))

    Turns are taken in a fixed order, so that ranks that run the same generators exchange in the
    same order. Gradients of one micro-batch are not interleaved with another's.
    """
    results: dict[int, T] = {}
    waiting = dict(enumerate(micro_batches))
    while waiting:
        for at, micro_batch in list(waiting.items()):
            try:
                next(micro_batch)
            except StopIteration as stop:
                results[at] = stop.value
                del waiting[at]
    return [results[at] for at in range(len(micro_batches))]
