"""`MoEAlltoAllSeqOverLapDispatcher`: vLLM-Ascend 0.9.1's dispatcher, on moe_fx's ops.

::

    shared, rows, tokens_per_expert = dispatcher.token_permutation(hidden, probs, ids)
    out, _ = dispatcher.token_unpermutation(experts(rows, tokens_per_expert))

or phase by phase, of two micro-batches in turn (`moe_fx.interleave`). What differs from the
original, and why: docs/dispatcher.md.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

import torch
from torch import Tensor

from moe_fx.dispatcher.base import MoEDispatcher
from moe_fx.dispatcher.exchange import Step
from moe_fx.dispatcher.streams import Beside, side_stream
from moe_fx.errors import BadInput

__all__ = ["MoEAlltoAllSeqOverLapDispatcher"]


class MoEAlltoAllSeqOverLapDispatcher(MoEDispatcher):
    """Dropless unless a capacity is set; differentiable; ranks may have any numbers of tokens."""

    overlap_stream: Any = None
    """Where shared experts run on devices with streams; one for all dispatchers."""

    cached_shared_expert_output: Any = None
    _step: Step | None = None

    # -- the whole way ----------------------------------------------------------------------------

    def token_permutation(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Any, Tensor, Tensor]:
        """``[..., H], [T, K], [T, K]`` to (the shared experts' result or None, rows ``[R, H]``
        sorted by local expert, rows of each local expert ``[L]``). `BadInput` on every rank if it
        is bad on any."""
        step = self._begin(hidden_states, probs, routing_map)
        step.permute1()
        step.start_dispatch()
        shared = self._beside(self.shared_experts, hidden_states)
        step.finish_dispatch()
        rows, counts = step.permute2()
        return None if shared is None else _first(shared.result()), rows, counts

    def token_unpermutation(self, hidden_states: Tensor, bias: Any = None) -> tuple[Tensor, None]:
        """The experts' results ``[R, H]`` to ``[..., H]``, weighted and summed, and None."""
        if bias is not None:
            raise BadInput("Bias is not supported: add it to the experts' result")
        step = self._current("token_permutation")
        step.unpermute1(hidden_states)
        step.start_combine()
        step.finish_combine()
        return self._end(), None

    def preprocess(self, indices: Tensor, with_sync: bool = True) -> Tensor:
        """``[T, K]`` expert ids to ``[L]``, rows of each local expert over all ranks. with_sync:
        wait for the sizes of the exchange too."""
        nothing = torch.zeros((indices.shape[0], self.tp_ep_size), device=indices.device)
        probs = torch.ones(indices.shape, device=indices.device)
        self._step = Step(self, nothing, probs, indices)
        if with_sync:
            self._step.host_sizes()
        return self._step.tokens_per_expert

    # -- phase by phase ---------------------------------------------------------------------------

    def preprocess_and_permute1(
        self,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
        shared_experts: Callable[[Tensor], Any] | None = None,
        shared_experts_input: Tensor | None = None,
    ) -> None:
        """The result of ``shared_experts``, of ``shared_experts_input`` or else of the tokens, is
        in ``cached_shared_expert_output``."""
        step = self._begin(hidden_states, probs, routing_map)
        given = hidden_states if shared_experts_input is None else shared_experts_input
        shared = self._beside(shared_experts, given)
        step.permute1()
        self.cached_shared_expert_output = None if shared is None else shared.result()

    preprocess_and_permtute1 = preprocess_and_permute1

    def dispatch_alltoall(self) -> None:
        self.start_dispatch()
        self.finish_dispatch()

    def start_dispatch(self) -> None:
        """Rows are under way until `finish_dispatch`."""
        self._current("preprocess_and_permute1").start_dispatch()

    def finish_dispatch(self) -> None:
        self._current("start_dispatch").finish_dispatch()

    def permute2(self) -> tuple[Tensor, Tensor]:
        """Rows ``[R, H]`` sorted by local expert, and how many of each ``[L]``."""
        return self._current("dispatch_alltoall").permute2()

    def unpermute1(self, hidden_states: Tensor) -> None:
        self._current("permute2").unpermute1(hidden_states)

    def combine_alltoall(self) -> None:
        self.start_combine()
        self.finish_combine()

    def start_combine(self) -> None:
        """Results are under way until `finish_combine`."""
        self._current("unpermute1").start_combine()

    def finish_combine(self) -> None:
        self._current("start_combine").finish_combine()

    def unpermute2(self) -> Tensor:
        self._current("combine_alltoall")
        return self._end()

    def steps(
        self,
        hidden_states: Tensor,
        probs: Tensor,
        routing_map: Tensor,
        experts: Callable[[Tensor, Tensor], Tensor],
    ) -> Generator[None, None, Tensor]:
        """The whole way as a generator for `moe_fx.interleave`: stops while rows travel. Several
        may be under way at once. ``experts(rows [R, H], counts [L]) -> [R, H]``."""
        step = Step(self, hidden_states, probs, routing_map)
        step.permute1()
        step.start_dispatch()
        yield
        step.finish_dispatch()
        step.unpermute1(experts(*step.permute2()))
        step.start_combine()
        yield
        step.finish_combine()
        return step.unpermute2()

    # -- the rank's experts ------------------------------------------------------------------------

    @property
    def num_local_experts(self) -> int:
        return self.config.num_local_experts

    @property
    def local_expert_indices(self) -> list[int]:
        """Of all ranks' experts, this one's."""
        first = self.ep_rank * self.num_local_experts
        return list(range(first, first + self.num_local_experts))

    # -- state of the step under way, by the original's names -------------------------------------

    @property
    def probs(self) -> Tensor | None:
        return None if self._step is None else self._step.probs

    @property
    def top_indices(self) -> Tensor | None:
        return None if self._step is None else self._step.ids

    routing_map = top_indices

    @property
    def hidden_shape(self) -> torch.Size | None:
        return None if self._step is None else self._step.hidden_shape

    @property
    def hidden_shape_before_permute(self) -> torch.Size | None:
        return None if self._step is None else self._step.permuted_shape

    @property
    def num_out_tokens(self) -> int | None:
        return None if self._step is None else self._step.num_pairs

    @property
    def tokens_per_expert(self) -> Tensor | None:
        return None if self._step is None else self._step.tokens_per_expert

    @property
    def num_global_tokens_per_local_expert(self) -> Tensor | None:
        return None if self._step is None else self._step.received

    @property
    def input_splits(self) -> Any:
        """Rows sent to each rank, as a numpy array; None with one rank."""
        return self._splits(0)

    @property
    def output_splits(self) -> Any:
        """Rows received from each rank, as a numpy array; None with one rank."""
        return self._splits(1)

    def _splits(self, side: int) -> Any:
        if self._step is None or self.ep_size == 1:
            return None
        return self._step.host_sizes()[0, side].numpy()

    @property
    def reversed_local_input_permutation_mapping(self) -> Tensor | None:
        return None if self._step is None else self._step.row_map

    @property
    def reversed_global_input_permutation_mapping(self) -> Tensor | None:
        return None if self._step is None else self._step.local_row_map

    @property
    def global_input_tokens_local_experts_indices(self) -> Tensor | None:
        """``[R]``: the local expert of each row as it arrives."""
        if self._step is None or self.num_local_experts == 1:
            return None
        received = self._step.received
        return torch.ops.moe_fx.arrived_experts(received, int(received.sum())).int()

    @property
    def expert_ids_per_ep_rank(self) -> Tensor:
        """``[E]`` int32: each expert's place among those of its rank."""
        device = "cpu" if self._step is None else self._step.received.device
        ids = torch.arange(self.num_experts, dtype=torch.int32, device=device)
        return ids % self.num_local_experts

    @property
    def device_sync_point(self) -> str:
        """Where this host waits for the device: "before_permutation_1" (drops: the number of rows
        must be known), "before_ep_alltoall" (split sizes), or "no_sync" (one rank)."""
        if self.config.moe_expert_capacity_factor is not None and not (
            self.config.moe_pad_expert_input_to_capacity
        ):
            return "before_permutation_1"
        return "before_ep_alltoall" if self.ep_size > 1 else "no_sync"

    # -- helpers ----------------------------------------------------------------------------------

    def _begin(self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor) -> Step:
        self._step = Step(self, hidden_states, probs, routing_map)
        return self._step

    def _current(self, earlier: str) -> Step:
        if self._step is None:
            raise RuntimeError(f"no tokens are under way: call {earlier} first")
        return self._step

    def _end(self) -> Tensor:
        step, self._step = self._current("token_permutation"), None
        return step.unpermute2()

    def _beside(self, work: Callable[[Tensor], Any] | None, tokens: Tensor) -> Beside | None:
        if work is None:
            return None
        cls = MoEAlltoAllSeqOverLapDispatcher
        if cls.overlap_stream is None and not torch.compiler.is_compiling():
            cls.overlap_stream = side_stream(tokens.device)
        return Beside(lambda: work(tokens), cls.overlap_stream)


def _first(result: Any) -> Any:
    return result[0] if isinstance(result, (tuple, list)) else result
