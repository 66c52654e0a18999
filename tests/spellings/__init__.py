"""How public projects write an MoE block, spelling by spelling: small, seeded, capturable.

``SPELLINGS[name]`` says what a correct reading of the block's graph finds. ``python -m
tests.spellings.dump DIR`` writes each block's graph as the passes see it.
"""

from __future__ import annotations

from tests.spellings import capacity, dense, gathered, hugging_face, loops, sorted_rows
from tests.spellings.base import Spelling

__all__ = ["SPELLINGS", "Spelling"]

SPELLINGS: dict[str, Spelling] = {
    spelling.name: spelling
    for module in (gathered, sorted_rows, loops, dense, capacity, hugging_face)
    for spelling in module.SPELLINGS
}
