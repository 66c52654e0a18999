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


LONG = {
    "devices/cuda/test_kernels.py",
    "docs/test_snippets.py",
    "e2e/test_checkpointing.py",
    "e2e/test_chunked_exchange.py",
    "e2e/test_families.py",
    "e2e/test_missing_rank.py",
    "e2e/test_programs.py",
    "e2e/test_sharded_models.py",
    "e2e/test_trainer.py",
    "e2e/test_uneven_experts.py",
    "one_gpu/test_one_gpu.py",
    "passes/strategies/test_fewer_experts.py",
    "passes/test_post_grad.py",
}
"""Files that take a minute and more each: half of the time of all."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Whoever runs everything leaves these to .ci/run; who names a file or folder gets it."""
    if config.args != config.getini("testpaths"):
        return
    folder = Path(__file__).parent
    for item in items:
        if item.path.relative_to(folder).as_posix() in LONG:
            item.add_marker("long")


@pytest.fixture(scope="session")
def ranks2(moe_fx_ranks: Callable[[int], RankPool]) -> RankPool:
    return moe_fx_ranks(2)


@pytest.fixture(scope="session")
def ranks4(moe_fx_ranks: Callable[[int], RankPool]) -> RankPool:
    return moe_fx_ranks(4)
