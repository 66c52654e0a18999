"""Ranks that all tests share: started by the first test that uses them, ended with the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from moe_fx.testing import RankPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def ranks4() -> Iterator[RankPool]:
    with RankPool(4) as pool:
        yield pool
