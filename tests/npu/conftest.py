"""Runs where torch_npu is: in the environment that ``python -m tests.npu`` makes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest

from moe_fx.testing import RankPool

if importlib.util.find_spec("torch_npu") is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session")
def torchair_ranks() -> Iterator[RankPool]:
    """Ranks in which npugraph_ex does not compile: torchair could not any more."""
    with RankPool(2) as pool:
        yield pool
