"""The original dispatcher, from vLLM-Ascend 0.9.1's wheel, on the CPU.

Its three ``torch_npu`` ops are replaced by what their documentation says, its streams and events by
ones that do nothing, vLLM's expert-parallel group by the one given.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

VERSION = "0.9.1"


class Unavailable(Exception):
    """The wheel cannot be had here; the message says why."""


def fetch() -> Path:
    """The unpacked wheel, downloaded once a machine. Raises `Unavailable`."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moe_fx"
    root = cache / f"vllm_ascend-{VERSION}"
    if root.is_dir():
        return root
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [
            *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder),
            *("--only-binary=:all:", "--python-version", "3.11", "--implementation", "cp"),
            *("--platform", "manylinux2014_x86_64", f"vllm-ascend=={VERSION}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise Unavailable(f"pip cannot download vllm-ascend {VERSION}: {last}")
        unpacked = Path(folder) / "unpacked"
        zipfile.ZipFile(wheels[0]).extractall(unpacked)
        try:
            unpacked.rename(root)
        except OSError:  # another process was faster
            if not root.is_dir():
                raise
    return root


def token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None = None, padded_mode: bool = False
) -> tuple[Tensor, Tensor]:
    """``torch_npu.npu_moe_token_permute``."""
    top_k = indices.shape[1] if indices.dim() == 2 else 1
    order = torch.argsort(indices.reshape(-1).long(), stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel())
    return tokens[order // top_k], places.to(torch.int32)


def token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
    padded_mode: bool = False,
    restore_shape: Any = None,
) -> Tensor:
    """``torch_npu.npu_moe_token_unpermute``."""
    rows = permuted_tokens[sorted_indices.long()]
    if probs is None:
        return rows
    tokens, top_k = probs.shape
    return (rows.view(tokens, top_k, rows.shape[-1]) * probs.unsqueeze(-1)).sum(1)


class _Event:
    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...


class _Stream:
    def wait_event(self, _: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self) -> _Event:
        return _Event()


@contextmanager
def original(root: Path, group: dist.ProcessGroup) -> Iterator[Any]:
    """The wheel's ``token_dispatcher`` module, with ``group`` as vLLM's expert-parallel group."""
    npu = SimpleNamespace(
        Stream=_Stream,
        Event=_Event,
        current_stream=_Stream,
        current_device=lambda: "cpu",
        stream=lambda _: nullcontext(),
    )
    ours = SimpleNamespace(device_group=group, rank_in_group=group.rank(), world_size=group.size())
    modules = {
        "torch_npu": _module(
            "torch_npu",
            npu=npu,
            npu_moe_token_permute=token_permute,
            npu_moe_token_unpermute=token_unpermute,
        ),
        **{name: _module(name) for name in ("vllm", "vllm.distributed")},
        "vllm.distributed.parallel_state": _module("parallel_state", get_ep_group=lambda: ours),
        **{name: _module(name) for name in ("vllm_ascend", "vllm_ascend.distributed")},
        "vllm_ascend.ops": _module("vllm_ascend.ops"),
    }
    histc, exchange = torch.histc, dist.all_to_all_single

    def integer_histc(values: Tensor, **kwargs: Any) -> Tensor:
        return histc(values.float(), **kwargs).to(torch.int64)

    def exchange_arrays(out: Tensor, given: Tensor, *splits: Any, **kwargs: Any) -> Any:
        names = ("output_split_sizes", "input_split_sizes")
        kwargs |= dict(zip(names, splits, strict=False))
        for name in names:
            if kwargs.get(name) is not None:
                kwargs[name] = [int(size) for size in kwargs[name]]
        return exchange(out, given, **kwargs)

    with (
        patch.dict(sys.modules, modules),
        patch.object(torch, "npu", npu, create=True),
        patch.object(torch, "histc", integer_histc),
        patch.object(dist, "all_to_all_single", exchange_arrays),
    ):
        _load("vllm_ascend.distributed.tensor_parallel", root)
        _load("vllm_ascend.ops.comm_utils", root)
        yield _load("vllm_ascend.ops.moe_dispatcher.token_dispatcher", root)


def _module(name: str, **attributes: Any) -> ModuleType:
    module: Any = ModuleType(name)
    module.__path__ = []
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


def _load(name: str, root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, root / f"{name.replace('.', '/')}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
