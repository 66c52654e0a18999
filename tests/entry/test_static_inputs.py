"""Inputs that are the model's own reach the base compiler as such: it need not look at them in
every call, nor copy them for each replay of a CUDA graph."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch._inductor import compile_fx

from tests.passes.graphs import block, tokens


def static_inputs(backend: str, training: bool, **options: Any) -> list[int]:
    """How many there are, of each graph that Inductor compiles for a forward."""
    module = block("qwen3_moe", hidden_size=64).requires_grad_(training)
    found: list[int] = []
    original = compile_fx.get_input_idxs_to_check

    def seen(inputs: Any, static: Any) -> Any:
        found.append(len(static))
        return original(inputs, static)

    torch._dynamo.reset()
    given = {"options": options} if options else {}
    with (
        mock.patch.object(compile_fx, "get_input_idxs_to_check", seen),
        torch._inductor.config.patch(force_disable_caches=True),
        torch.set_grad_enabled(training),
    ):
        torch.compile(module, backend=backend, **given)(tokens(1, 5, 64))
    return found


@pytest.mark.parametrize("training", [False, True])
def test_parameters_are_static_as_they_are_without_moe_fx(training: bool) -> None:
    plain = static_inputs("inductor", training)
    assert plain[0] > 0
    assert static_inputs("moe_fx", training, strict=True) == plain
