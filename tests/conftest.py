"""Ranks that all tests share: started by the first test that uses them, ended with the session."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moe_fx
from moe_fx.testing import RankPool

pytest_plugins = ["moe_fx_pytest"]  # already there if this checkout is installed
torch.set_num_threads(1)


def _digest_of_sources() -> str:
    assert moe_fx.__file__ is not None
    files = sorted(Path(moe_fx.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


# torch's compile caches do not see that an op was edited: without this, a test of compiled code
# could run what was compiled before the edit. The ranks inherit the environment.
os.environ["TORCH_COMPILE_CACHE_KEY_TAG"] = _digest_of_sources()
torch.compiler.config.cache_key_tag = os.environ["TORCH_COMPILE_CACHE_KEY_TAG"]

os.environ["MOE_FX_NET"] = "0"  # a bug is to be seen as the exception that it is, on ranks too


@pytest.fixture(scope="session")
def ranks2(moe_fx_ranks: Callable[[int], RankPool]) -> RankPool:
    return moe_fx_ranks(2)


@pytest.fixture(scope="session")
def ranks4(moe_fx_ranks: Callable[[int], RankPool]) -> RankPool:
    return moe_fx_ranks(4)
