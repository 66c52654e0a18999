"""What goes wrong is said in one paragraph: what, where, what was expected, what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._dynamo import register_backend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

import moe_fx
from moe_fx.entry.backend import check_devices
from moe_fx.testing import RankPool
from tests.e2e.ranks import expert_block


def compile_error(rank: int, num_experts: int, options: dict[str, Any]) -> str:
    """The message of what compiling a block of so many experts over all ranks raises."""
    block = expert_block(num_experts=num_experts)
    options = {"ep_group": dist.group.WORLD, "base": "eager", **options}
    try:
        torch.compile(block, backend="moe_fx", options=options)(torch.randn(1, 6, 64))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def device_error(rank: int) -> str:
    with FakeTensorMode():
        inputs = [torch.empty(2, 3, device="cuda")]
    try:
        check_devices(dist.group.WORLD, inputs)
    except moe_fx.ConfigurationError as error:
        return str(error)
    return "no error"


def test_model_on_a_device_the_group_does_not_serve(ranks2: RankPool) -> None:
    for message in ranks2.run(device_error):
        assert "is on cuda" in message
        assert "exchanges tensors on cpu only" in message
        assert "cpu:gloo,cuda:nccl" in message


def test_strict_with_nothing_to_match() -> None:
    compiled = torch.compile(
        torch.nn.Linear(4, 4), backend="moe_fx", options={"strict": True, "base": "eager"}
    )
    with pytest.raises(Exception, match="strict=True: no MoE layer was found") as error:
        compiled(torch.randn(2, 4))
    assert "moe_fx.explain(model, *args)" in str(error.value)


def test_strict_with_a_declined_candidate_names_reason_and_line() -> None:
    def sample(logits: torch.Tensor) -> torch.Tensor:
        return torch.multinomial(logits.topk(3).values.softmax(-1), 1)

    compiled = torch.compile(sample, backend="moe_fx", options={"strict": True, "base": "eager"})
    with pytest.raises(Exception, match=r"never bring tokens to experts .*test_errors\.py:\d+"):
        compiled(torch.randn(5, 9))


@pytest.mark.parametrize("name", ["post_grad_custom_pre_pass", "reorder_for_locality"])
def test_an_option_of_the_base_compiler_that_moe_fx_sets_itself(
    ranks2: RankPool, name: str
) -> None:
    options = {"base": "inductor", "base_options": {name: False}}
    for message in ranks2.run(compile_error, 8, options):
        assert f"moe_fx sets {name} itself" in message
        assert "Leave them out" in message


def test_a_base_compiler_that_does_not_exist() -> None:
    compiled = torch.compile(torch.nn.Linear(4, 4), backend="moe_fx", options={"base": "aot_eagre"})
    with pytest.raises(Exception, match=r"no backend 'aot_eagre'\. Did you mean aot_eager"):
        compiled(torch.ones(1, 4))


def test_a_base_compiler_gets_its_options() -> None:
    seen: list[dict[str, Any]] = []

    @register_backend(name="noting")
    def noting(module: GraphModule, inputs: list[Any], **given: Any) -> Any:
        seen.append(given)
        return module.forward

    options = {"base": "noting", "base_options": {"level": 3}}
    torch.compile(torch.nn.Linear(4, 4), backend="moe_fx", options=options)(torch.ones(1, 4))
    assert seen == [{"options": {"level": 3}}]
