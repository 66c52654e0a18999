"""``python -m tests.mutations [NAME ...] [--verify compile] [--others N]``: real blocks with one
mistake each, and what the passes make of them. Exits 1 if a rewrite does not compute what the
changed block does.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tests.mutations.changes import Mutation
from tests.mutations.every_node import mutations
from tests.mutations.kinds import mistakes
from tests.mutations.outcomes import FINE, outcome
from tests.passes.graphs import BLOCKS, Captured, block, captured, tokens
from tests.spellings import SPELLINGS

_HEADINGS = ("tried", "declined", "rewritten to its meaning", "invalid", "WRONG")


class Residual(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        result = self.layer(x)
        return x + (result[0] if isinstance(result, tuple) else result)


def _block(family: str, form: str) -> Callable[[], Captured]:
    return lambda: captured(Residual(block(family, form)), tokens(1, 12, 64))


def _spelled(name: str) -> Callable[[], Captured]:
    def make() -> Captured:
        spelling = SPELLINGS[name]
        with torch._dynamo.config.patch(
            capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
        ):
            return captured(Residual(spelling.build()), spelling.tokens())

    return make


BY_RULES: dict[str, Callable[[], Captured]] = {
    f"{family} {form}": _block(family, form)
    for family in BLOCKS
    for form in ("grouped_mm", "batched_mm")
}
"""Name -> captured graph with one MoE layer of 2 of 8 experts, hidden size 64, on 12 tokens."""

BY_VALUE = {
    f"{name} {SPELLINGS[name].dispatch.replace(' ', '_')}": _spelled(name)
    for name in (
        "gpt_fast",
        "torchtitan_for_loop",
        "classic_mixtral",
        "masked_loop",
        "dense_einsum",
        "llama4_before",
        "gshard_drops",
        "switch_masked",
    )
}
"""The same of spellings that are read by value (`tests/spellings`), hidden size 32, 22 tokens."""

CASES = BY_RULES | BY_VALUE


def chosen(case: Captured, others: int, by_rules: bool = True) -> Iterator[Mutation]:
    """Of a layer that is read by rules every mistake; of the changes to every node ``others``,
    spread evenly."""
    if by_rules:
        yield from mistakes(case.module)
    if others:
        every = list(mutations(case.module))
        yield from every[:: max(1, -(-len(every) // others))]


def measure(
    name: str, case: Captured, *, verify: str = "off", others: int = 0, by_rules: bool = True
) -> tuple[dict[str, Counter[str]], list[str]]:
    """(kind -> how many came out how, what is wrong in words) for any captured graph."""
    counts: dict[str, Counter[str]] = {}
    wrong = []
    for mutation in chosen(case, others, by_rules):
        found = outcome(case, mutation, verify)
        if found not in FINE:
            wrong.append(f"{name}, {mutation.kind}, {mutation}: {found}")
            found = "wrong"
        counts.setdefault(mutation.kind, Counter())[found] += 1
    return counts, wrong


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Cases whose name has this.")] = None,
    verify: Annotated[str, typer.Option(help="off: structure alone must not err.")] = "off",
    others: Annotated[int, typer.Option(help="Changes to arbitrary nodes, per case.")] = 12,
) -> None:
    torch._logging.set_logs(dynamo=logging.ERROR)
    torch.set_num_threads(1)  # nothing here is large enough for two
    table = Table(title=f"Mutated blocks, verify={verify}")
    for heading in ("block", "implementation", "mutation"):
        table.add_column(heading)
    for heading in _HEADINGS:
        table.add_column(heading, justify="right")
    failures: list[str] = []
    total: Counter[str] = Counter()
    for name, make in CASES.items():
        if names and not any(part in name for part in names):
            continue
        counts, wrong = measure(
            name, make(), verify=verify, others=others, by_rules=name in BY_RULES
        )
        failures += wrong
        for kind, found in counts.items():
            total += found
            table.add_row(*name.split(" "), kind, *_cells(found))
        table.add_section()
    table.add_row("all", "", "", *_cells(total))
    Console().print(table)
    for failure in failures:
        Console(stderr=True).print(f"WRONG: {failure}", markup=False)
    sys.exit(1 if failures or not total else 0)


def _cells(found: Counter[str]) -> list[str]:
    each = [found[key] for key in ("declined", "equal", "invalid", "wrong")]
    return [str(n) for n in (sum(each), *each)]


if __name__ == "__main__":
    typer.run(main)
