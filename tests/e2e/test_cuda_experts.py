"""On an NVIDIA GPU: the kernels of a local layer, by value, and a model's layer compiled with them.

Skipped elsewhere. ``pytest -m slow tests/e2e/test_cuda_experts.py``
"""

from __future__ import annotations

import pytest
import torch

from tests.cuda_ranks import needs_cuda
from tests.devices.cuda.cases import CASES, wrong
from tests.passes.graphs import block, relative_error, tokens

pytestmark = [pytest.mark.slow, pytest.mark.timeout(500), needs_cuda]


@pytest.mark.parametrize("kind", CASES)
def test_kernels(kind: str) -> None:
    assert [name for name, off in wrong(kind, "cuda") if off is not None] == []


@pytest.mark.parametrize("training", [False, True])
def test_a_layer_compiled_once_for_all_numbers_of_tokens(training: bool) -> None:
    module = block("qwen3_moe", dtype=torch.float32, hidden_size=128, moe_intermediate_size=64)
    module = module.cuda().requires_grad_(training)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="moe_fx", dynamic=True, options={"strict": True})
    for count in (2, 17, 300, 17):
        found = []
        for call in (module, compiled):
            module.zero_grad()
            x = tokens(1, count, 128, seed=count).cuda().requires_grad_(training)
            with torch.set_grad_enabled(training):
                out = call(x)
                out = out if isinstance(out, torch.Tensor) else out[0]
            if training:
                out.square().sum().backward()
            given = [x.grad, *(each.grad for each in module.parameters())] if training else []
            found.append([out.detach(), *(each.clone() for each in given if each is not None)])
        for made, right in zip(*reversed(found), strict=True):
            assert relative_error(right, made) < 1e-4
