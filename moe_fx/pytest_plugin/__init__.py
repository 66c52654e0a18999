"""pytest plugin of moe_fx: the fixture ``moe_fx_ranks``.

pytest loads it in every session where moe_fx is installed, so it is installed as ``moe_fx_pytest``,
outside the package, and imports neither that nor torch before a test asks for ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from moe_fx.testing import RankPool


@pytest.fixture(scope="session")
def moe_fx_ranks() -> Iterator[Callable[[int], RankPool]]:
    """``moe_fx_ranks(4)``: four ranks of this machine over Gloo, a `moe_fx.testing.RankPool`.

    Started by the first test that runs something on them, shared by all tests of the session.
    """
    from moe_fx.testing import RankPool

    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool
    for started in pools.values():
        started.close()
