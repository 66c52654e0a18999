"""``DistributedConfig(ep_size=..., ep_implementation="moe_fx")``: transformers' own expert
parallelism, its tokens brought by moe_fx's dispatcher.

transformers shards the experts, loads them and calls the implementation; rows travel through
`moe_fx.dispatcher`, so the layer has no branch on data and compiles as one graph, and under
``backend="moe_fx"`` its exchange is cut into chunks and overlapped like any other.

Ranks of a tensor-parallel group share a batch: each dispatches its slice of the tokens, and the
results are gathered. Slices may be uneven, or empty.

Registered by ``import moe_fx.integrations.transformers``. Needs transformers with
``transformers.distributed.expert_parallel`` (5.23).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_fx.dispatcher import MoEDispatcherConfig
from moe_fx.dispatcher.base import MoEDispatcher
from moe_fx.dispatcher.exchange import Step

__all__ = ["register"]


def register() -> None:
    """Make ``ep_implementation="moe_fx"`` known, if this transformers has such a choice."""
    try:
        from transformers.distributed.expert_parallel import (
            EPImplementation,
            EPImplementationInterface,
        )
    except ImportError:  # before 5.23, whose DistributedConfig takes no ep_implementation
        return

    class MoeFxEP(EPImplementation):  # type: ignore[misc]
        """Each pair's row to its expert's rank, and back."""

        def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            config = MoEDispatcherConfig(num_local_experts=experts.num_experts)
            self.dispatcher = MoEDispatcher(config, ep_mesh.get_group())

        def __call__(
            self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
        ) -> Tensor:
            if self.tp_mesh.size() == 1:
                return self.exchanged(hidden_states, top_k_index, top_k_weights)
            own = (_own(t, self.tp_mesh) for t in (hidden_states, top_k_index, top_k_weights))
            return _whole(self.exchanged(*own), hidden_states.shape, self.tp_mesh)

        def exchanged(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            """Experts run top-1 with unit weights, in the order in which rows arrive."""
            step = Step(self.dispatcher, hidden, weights, ids)
            step.permute1()
            step.start_dispatch()
            step.finish_dispatch()
            rows, experts = step.as_arrived()
            ones = torch.ones((rows.shape[0], 1), dtype=rows.dtype, device=rows.device)
            step.unpermute1(self.experts_forward(rows, experts.unsqueeze(1), ones))
            step.start_combine()
            step.finish_combine()
            return step.unpermute2()

    EPImplementationInterface.register("moe_fx", MoeFxEP)


def _own(batch: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's slice of a batch that all ranks of ``mesh`` have; its gradient is gathered."""
    shared = DTensor.from_local(batch, mesh, [Replicate()], run_check=False)
    return shared.redistribute(mesh, [Shard(0)]).to_local()


def _whole(rows: Tensor, size: torch.Size, mesh: DeviceMesh) -> Tensor:
    """The slices of all ranks, gathered; the gradient is the own slice's."""
    slices = DTensor.from_local(
        rows.contiguous(), mesh, [Shard(0)], shape=size, stride=(size[1], 1), run_check=False
    )
    return slices.full_tensor()
