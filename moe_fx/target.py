"""What ``moe-fx explain`` is given: ``hf:MODEL_TYPE`` or ``path/to/file.py:factory``."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moe_fx.errors import ConfigurationError
from moe_fx.tiny import tiny_model

_FORMS = "Give hf:MODEL_TYPE, such as hf:qwen3_moe, or path/to/file.py:factory."


@dataclass(frozen=True)
class Target:
    """A model and what to call it with."""

    model: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Target:
        """Parameters, buffers and floating arguments in ``dtype``."""

        def cast(value: Any) -> Any:
            floating = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if floating else value

        model = self.model.to(dtype) if isinstance(self.model, nn.Module) else self.model
        return Target(model, pytree.tree_map(cast, self.args), pytree.tree_map(cast, self.kwargs))


def load(target: str, implementation: str | None = None) -> Target:
    """``implementation``: transformers' experts implementation, for ``hf:``; None: its own choice.

    Raises `ConfigurationError` saying what a target looks like.
    """
    where, _, name = target.rpartition(":")
    if where == "hf":
        return _family(name, implementation)
    file = Path(where)
    if not file.is_file():
        raise ConfigurationError(f"There is no file {where or target!r}. {_FORMS}")
    module = _import(file)
    factory = getattr(module, name, None)
    if not callable(factory):
        own = [n for n, f in inspect.getmembers(module, inspect.isfunction) if n[0] != "_"]
        raise ConfigurationError(
            f"{where!r} has no function {name!r}. Its functions: {', '.join(own) or 'none'}."
        )
    return _made_by(factory, target)


def _family(name: str, implementation: str | None) -> Target:
    chosen: dict[str, Any] = {"experts_implementation": implementation} if implementation else {}
    model = tiny_model(name, **chosen)
    ids = torch.randint(model.config.vocab_size, (1, 12))
    return Target(model, (), {"input_ids": ids, "use_cache": False})


def _import(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"{str(file)!r} is not a Python file. {_FORMS}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    sys.path.insert(0, str(file.parent))
    spec.loader.exec_module(module)
    return module


def _made_by(factory: Callable[[], Any], target: str) -> Target:
    made = factory()
    match made:
        case (model, (list() | tuple()) as args) if callable(model):
            return Target(model, tuple(args), {})
        case (model, (list() | tuple()) as args, dict() as kwargs) if callable(model):
            return Target(model, tuple(args), kwargs)
    raise ConfigurationError(
        f"{target!r} returned {_described(made)}, expected (model, args) or (model, args, kwargs), "
        "as in: return MyModel(), (torch.randn(8, 64),)"
    )


def _described(made: Any) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(type(item).__name__ for item in made)})"
    return f"a {type(made).__name__}"
