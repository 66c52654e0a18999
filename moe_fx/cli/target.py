"""What ``moe-fx explain`` is given: ``hf:MODEL_TYPE`` or ``path/to/file.py:factory``.

Whatever the user's own code raises on the way is a `ConfigurationError` that says where.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from moe_fx.cli.tiny import tiny_model
from moe_fx.entry.explain import explain
from moe_fx.errors import ConfigurationError, MoeFxError
from moe_fx.report import Report

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

    def explain(self, dynamic: bool | None = None, ranks: int | None = None) -> Report:
        """As `moe_fx.explain`. `ConfigurationError` if the model does not run."""
        with _users_code("The model cannot be captured"):
            try:
                with _without_tracers_log():
                    return explain(
                        self.model, *self.args, dynamic=dynamic, ranks=ranks, **self.kwargs
                    )
            except Exception:
                with _users_code("The model cannot be run with these arguments"):
                    self.model(*self.args, **self.kwargs)  # says it better than a tracer does
                raise


@contextmanager
def _without_tracers_log() -> Iterator[None]:
    """Torch 2.14 logs a traceback of its own for what a model cannot run, before the error."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def load(target: str, implementation: str | None = None, dtype: str | None = None) -> Target:
    """``implementation``: transformers' experts implementation, for ``hf:``; None: its own choice.
    ``dtype``: what it is cast to, as `Target.to` does; None: it stays.

    Raises `ConfigurationError` saying what a target looks like.
    """
    found = _load(target, implementation)
    if dtype is None:
        return found
    with _users_code(f"The model cannot be cast to {dtype}"):
        return found.to(getattr(torch, dtype))


def _load(target: str, implementation: str | None) -> Target:
    where, _, name = target.rpartition(":")
    if where == "hf":
        return _family(name, implementation)
    if implementation is not None:
        raise ConfigurationError(
            "An experts implementation is for a model of transformers (hf:MODEL_TYPE): let your "
            "function set it."
        )
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
    with _users_code(f"{str(file)!r} cannot be imported"):
        spec.loader.exec_module(module)
    return module


def _made_by(factory: Callable[[], Any], target: str) -> Target:
    with _users_code(f"{target!r} failed"):
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


@contextmanager
def _users_code(failure: str) -> Iterator[None]:
    """Around what the user wrote: what it raises becomes a `ConfigurationError` that begins with
    ``failure`` and names error and line. What moe_fx raises on purpose passes through."""
    try:
        yield
    except MoeFxError:
        raise
    except (Exception, SystemExit) as error:
        said = str(error).strip().splitlines()
        what = type(error).__name__ + f": {said[0]}" * bool(said)
        raise ConfigurationError(f"{failure}: {what}{_where(error)}") from error


def _where(error: BaseException) -> str:
    """The last line of the user's that ``error`` came through."""
    own = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(_NOT_THE_USERS)
    ]
    return f" (at {own[-1].filename}:{own[-1].lineno} in {own[-1].name})" if own else ""


_NOT_THE_USERS = (
    *(str(Path(module.__file__).parent) for module in (torch, importlib) if module.__file__),
    str(Path(__file__).parent),
    "<",  # <frozen importlib>, code made by torch
)


def _described(made: Any) -> str:
    if isinstance(made, tuple):
        return f"({', '.join(type(item).__name__ for item in made)})"
    return f"a {type(made).__name__}"
