"""The tensors of a safetensors checkpoint, opened without reading them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from moe_fx.errors import ConfigurationError


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
