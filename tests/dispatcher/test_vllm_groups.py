"""vLLM's groups, read from what vLLM has set up."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import moe_fx
from moe_fx.integrations.vllm_groups import groups


def vllm(monkeypatch: pytest.MonkeyPatch, get_ep_group: Any) -> None:
    """A stand-in for ``vllm.distributed.parallel_state``."""
    for name in ("vllm", "vllm.distributed"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    state: Any = ModuleType("vllm.distributed.parallel_state")
    state.get_ep_group = get_ep_group
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", state)


def test_the_group_is_vllm_s(monkeypatch: pytest.MonkeyPatch) -> None:
    group = object()
    vllm(monkeypatch, lambda: SimpleNamespace(device_group=group))
    assert groups() == {"ep_group": group}


def test_no_group_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise AssertionError("expert parallel group is not initialized")

    vllm(monkeypatch, missing)
    with pytest.raises(moe_fx.ConfigurationError, match="enable_expert_parallel"):
        groups()


def test_no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(moe_fx.ConfigurationError, match="not installed"):
        groups()
