"""safetensors checkpoints: their tensors opened without reading them, and files written a part at a
time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_fx.errors import ConfigurationError

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
}


def open_safetensors(checkpoint: Path, stack: ExitStack) -> dict[str, Any]:
    """The open file of each tensor in ``checkpoint``, a file or a directory."""
    from safetensors import safe_open

    index = checkpoint / "model.safetensors.index.json"
    if checkpoint.is_file():
        paths = [checkpoint]
    elif index.is_file():
        paths = [
            checkpoint / name
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))
        ]
    else:
        paths = sorted(checkpoint.glob("*.safetensors"))
    if not paths:
        raise ConfigurationError(
            f"{checkpoint} holds no safetensors files. Convert the checkpoint to safetensors "
            "(safetensors.torch.save_file); only these can be read a slice at a time."
        )
    files: dict[str, Any] = {}
    for path in paths:
        file = stack.enter_context(safe_open(path, framework="pt"))
        files.update(dict.fromkeys(file.keys(), file))
    return files


def names_in(folder: Path) -> dict[str, list[str]]:
    """By file of ``folder``, the tensors in it."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found[path.name] = list(file.keys())
    return found


class Writer:
    """A file of tensors whose shapes and dtypes are known, and whose values come in any order.

    The format, github.com/huggingface/safetensors: the length of the header, the header in JSON,
    then the tensors. (safetensors' own functions want all values at once.) tensors: may be on meta.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        widest_first = sorted(tensors.items(), key=lambda each: -each[1].itemsize)  # aligned
        for name, tensor in widest_first:
            begin, end = end, end + tensor.numel() * tensor.itemsize
            row = math.prod(tensor.shape[1:]) * tensor.itemsize
            self._places[name] = begin, row
            header[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._begin = 8 + len(text)
        self._file.truncate(self._begin + end)

    def write(self, name: str, value: Tensor, row: int = 0) -> None:
        """Rows of the tensor ``name``, from ``row`` on."""
        begin, size = self._places[name]
        self._file.seek(self._begin + begin + row * size)
        self._file.write(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        self._file.close()
