"""One step of a dispatcher: tokens to their experts' ranks and back, phase by phase.

::

    step = Step(dispatcher, hidden, probs, ids)     # counts of all ranks; queued, not waited for
    step.permute1()                                 # rows sorted by expert, hence by rank
    step.start_dispatch();  step.finish_dispatch()  # the exchange; anything may run in between
    rows, counts = step.permute2()                  # rows sorted by local expert
    step.unpermute1(experts(rows, counts))
    step.start_combine();   step.finish_combine()
    out = step.unpermute2()                         # weighted sum back in token order

Every phase drops what no later one needs, so buffers are free as early as they can be. With one
rank nothing is exchanged and the middle phases hand rows on. All of it is ops that Dynamo traces.

Shapes: ``T`` tokens (of all tensor-parallel ranks), ``K`` experts a token, ``H`` features (of this
tensor-parallel rank), ``W`` expert-parallel ranks, ``E`` experts, ``L`` local ones.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from moe_fx.compat import assert_on_device
from moe_fx.dispatcher.capacity import kept_keys, padded_slots
from moe_fx.dispatcher.tensor_parallel import (
    all_gather_last_dim_from_tensor_parallel_region,
    all_to_all_hp2sp,
    all_to_all_sp2hp,
    gather_from_sequence_parallel_region,
    reduce_scatter_last_dim_to_tensor_parallel_region,
)
from moe_fx.errors import BadInput
from moe_fx.ops.checked import DTYPES, FINE, refused, require_fine

if TYPE_CHECKING:
    from moe_fx.dispatcher.base import MoEDispatcher

__all__ = ["Step"]

_ops = torch.ops.moe_fx


class Step:
    """Raises `BadInput` on every rank if any rank's input cannot be dispatched."""

    def __init__(
        self, dispatcher: MoEDispatcher, hidden: Tensor, probs: Tensor, ids: Tensor
    ) -> None:
        self.config, self.num_experts = dispatcher.config, dispatcher.num_experts
        self.group_name, self.world = dispatcher.ep_group_name, dispatcher.ep_size
        self.rank, self.agree_timeout = dispatcher.ep_rank, dispatcher.agree_timeout
        self.waiting = {"exchange_timeout": dispatcher.exchange_timeout}
        self.tp_group = dispatcher.tp_ep_group
        self._refuse_unfit(hidden, probs, ids)
        self.hidden_shape, self.dtype = hidden.shape, hidden.dtype
        tokens = hidden.reshape(-1, hidden.shape[-1])
        self.tokens: Tensor | None = all_to_all_sp2hp(tokens, self.tp_group)
        self.probs: Tensor | None = gather_from_sequence_parallel_region(probs, self.tp_group)
        self.ids: Tensor | None = gather_from_sequence_parallel_region(ids, self.tp_group)
        self.permuted_shape, self.num_pairs = self.tokens.shape, self.ids.numel()
        self.capacity = self.config.capacity(self.num_pairs, self.num_experts)
        self._count()
        self.sizes: Tensor | None = None
        self.row_map: Tensor | None = None
        self.local_row_map: Tensor | None = None
        self.sent: Tensor | None = None
        self.arrived: Tensor | None = None
        self.handle: Tensor | None = None

    # -- what each rank gets ---------------------------------------------------------------------

    def _count(self) -> None:
        """counts ``[E]``: rows to each expert; received ``[W, L]``: rows for the local ones."""
        assert self.ids is not None and self.tokens is not None and self.probs is not None
        width, dtype = self.tokens.shape[1], DTYPES.index(self.dtype)
        counts, status = _ops.dispatch_counts(self.ids, self.num_experts, width, dtype)
        keys = self.ids
        if self.config.moe_pad_expert_input_to_capacity:
            counts = torch.full_like(counts, self.capacity)
        elif self.drops:
            inside = self.ids.clamp(0, self.num_experts - 1)
            keys = kept_keys(inside, self.probs, self.num_experts, self.capacity)
            counts = counts.clamp(max=self.capacity)
        self.keys: Tensor | None = keys
        self.counts = counts
        if self.world == 1:
            self.gathered = None
            self.received = counts.view(1, -1)
            self._check_alone(status)
            return
        self.gathered = self._gather(counts, status)
        local = self.num_experts // self.world
        first = self.rank * local
        self.received = self.gathered.narrow(1, first, local)

    def _gather(self, counts: Tensor, status: Tensor) -> Tensor:
        return _ops.gather_counts(
            counts, status, self.group_name, self.agree_timeout, **self.waiting
        )

    def _check_alone(self, status: Tensor) -> None:
        if torch.compiler.is_compiling() or status.device.type != "cpu":
            assert_on_device(status[0] == FINE, "an expert id is out of range")
        else:
            require_fine([status.tolist()], self.num_experts, 0)

    @property
    def drops(self) -> bool:
        return self.config.moe_expert_capacity_factor is not None

    @property
    def tokens_per_expert(self) -> Tensor:
        """``[L]`` rows of each local expert."""
        return self.received.sum(0)

    def host_sizes(self) -> Tensor:
        """``[1, 2, W]``: rows sent to and received from each rank. Waits for the device, once."""
        if self.sizes is None:
            if self.gathered is None:
                self.sizes = self.counts.sum().view(1, 1, 1).expand(1, 2, 1).cpu()
            else:
                self.sizes = _ops.checked_sizes(self.gathered, self.num_experts, self.rank)
        return self.sizes

    # -- there ------------------------------------------------------------------------------------

    def permute1(self) -> None:
        assert self.tokens is not None and self.ids is not None and self.probs is not None
        if self.config.moe_pad_expert_input_to_capacity:
            self.sent, self.row_map = self._padded()
        elif self.drops:
            pieces, self.row_map = _ops.permute_chunks(self.tokens, self.keys, self.host_sizes())
            self.sent = pieces[0]
        else:
            self.sent, self.row_map = _ops.permute(self.tokens, self.ids, self.num_pairs)
        self.tokens = self.keys = None

    def _padded(self) -> tuple[Tensor, Tensor]:
        assert self.tokens is not None and self.ids is not None and self.probs is not None
        num_slots = self.num_experts * self.capacity
        inside = self.ids.clamp(0, self.num_experts - 1)
        slots = padded_slots(inside, self.probs, self.num_experts, self.capacity)
        pairs = self.tokens.repeat_interleave(self.ids.shape[1], 0)
        buffer = self.tokens.new_zeros((num_slots + 1, self.tokens.shape[1]))
        return buffer.index_copy(0, slots.long(), pairs)[:num_slots], slots

    def start_dispatch(self) -> None:
        if self.world > 1:
            send, receive = self.host_sizes()[0].unbind(0)
            self.handle = self._start(send, receive)

    def finish_dispatch(self) -> None:
        assert self.sent is not None
        if self.world > 1:
            send, receive = self.host_sizes()[0].unbind(0)
            self.arrived = self._wait(send, receive, None)
        else:
            self.arrived = self.sent
        self.num_sent, self.sent = self.sent.shape[0], None

    def permute2(self) -> tuple[Tensor, Tensor]:
        assert self.arrived is not None
        rows, self.arrived = self.arrived, None
        self.num_rows = rows.shape[0]
        if self.world > 1 and self.received.shape[1] > 1:
            rows, self.local_row_map = _ops.regroup(rows, self.received)
        if self.config.moe_grouped_gemm:
            rows = all_gather_last_dim_from_tensor_parallel_region(rows, self.tp_group)
        return rows, self.tokens_per_expert

    def as_arrived(self) -> tuple[Tensor, Tensor]:
        """In place of `permute2`: rows as they arrived, and the local expert ``[R]`` of each."""
        assert self.arrived is not None
        rows, self.arrived = self.arrived, None
        self.num_rows = rows.shape[0]
        return rows, _ops.arrived_experts(self.received, self.num_rows)

    # -- and back ---------------------------------------------------------------------------------

    def unpermute1(self, rows: Tensor) -> None:
        if rows.dim() != 2 or (
            not torch.compiler.is_compiling() and rows.shape[0] != self.num_rows
        ):
            raise BadInput(
                f"the experts' result has shape {tuple(rows.shape)}; expected one row for each of "
                f"the {self.num_rows} that token_permutation gave"
            )
        rows = reduce_scatter_last_dim_to_tensor_parallel_region(rows, self.tp_group)
        if self.local_row_map is not None:
            shape = [rows.shape[0], rows.shape[1]]
            rows = _ops.unpermute(rows, self.local_row_map, None, shape)
        self.sent, self.local_row_map = rows, None

    def start_combine(self) -> None:
        if self.world > 1:
            send, receive = self.host_sizes()[0].unbind(0)
            self.handle = self._start(receive, send)

    def finish_combine(self) -> None:
        if self.world > 1:
            send, receive = self.host_sizes()[0].unbind(0)
            self.arrived = self._wait(receive, send, self.num_sent)
        else:
            self.arrived = self.sent
        self.sent = self.sizes = self.gathered = None

    def unpermute2(self) -> Tensor:
        assert self.arrived is not None
        rows, self.arrived = self.arrived, None
        tokens, width = self.permuted_shape[0], rows.shape[1]
        limited = self.drops
        out = _ops.unpermute(rows, self.row_map, self.probs, [tokens, width], limited)
        out = all_to_all_hp2sp(out, self.tp_group)
        self.row_map = self.probs = self.ids = None
        return out.view(*self.hidden_shape[:-1], out.shape[1]).to(self.dtype)

    def _start(self, send: Tensor, receive: Tensor) -> Tensor:
        return _ops.all_to_all(self.sent, send, receive, self.group_name, **self.waiting)

    def _wait(self, send: Tensor, receive: Tensor, num_rows: int | None) -> Tensor:
        handle, self.handle = self.handle, None
        return _ops.wait(
            handle, self.sent, send, receive, self.group_name, num_rows, **self.waiting
        )

    # -- bad input --------------------------------------------------------------------------------

    def _refuse_unfit(self, hidden: Tensor, probs: Tensor, ids: Tensor) -> None:
        """Raise `BadInput`, having told the other ranks, who wait for this one."""
        reason = _unfit(hidden, probs, ids, self.tp_group)
        if not torch.compiler.is_compiling():
            if self.tp_group is not None and self.tp_group.size() > 1:
                reason = self._unfit_beside(hidden, reason)
            if reason and self.world > 1:
                counts, status = refused(self.num_experts, hidden.device)
                self._gather(counts, status)
        if reason:
            raise BadInput(reason)

    def _unfit_beside(self, hidden: Tensor, reason: str) -> str:
        """The same for the tensor-parallel ranks, who must have as many tokens each."""
        assert self.tp_group is not None
        tokens = torch.tensor([math.prod(hidden.shape[:-1])], device=hidden.device)
        if reason:
            _, status = refused(self.num_experts, hidden.device)
        else:
            facts = [FINE, 0, hidden.shape[-1], DTYPES.index(hidden.dtype), self.num_experts]
            status = torch.tensor(facts, device=hidden.device)
        told = _ops.gather_counts(
            tokens, status, self.tp_group.group_name, self.agree_timeout, **self.waiting
        ).tolist()
        try:
            require_fine([each[1:] for each in told], self.num_experts, self.tp_group.rank())
        except BadInput as error:
            return reason or str(error)
        counts = [each[0] for each in told]
        if len(set(counts)) > 1:
            return f"tensor-parallel ranks have {counts} tokens; expected the same number each"
        return ""


def _unfit(
    hidden: Tensor,
    probs: Tensor,
    ids: Tensor,
    tp_group: dist.ProcessGroup | None,
) -> str:
    if hidden.dim() < 2:
        return f"hidden_states has shape {tuple(hidden.shape)}; expected [..., tokens, features]"
    if probs.dim() != 2:
        return f"Expected 2D tensor for probs, [tokens, k], got shape {tuple(probs.shape)}"
    if ids.dim() != 2:
        return f"Expected 2D tensor for routing map, [tokens, k], got shape {tuple(ids.shape)}"
    if probs.shape != ids.shape:
        return f"probs has shape {tuple(probs.shape)}, routing_map {tuple(ids.shape)}: not the same"
    tokens = math.prod(hidden.shape[:-1])
    if ids.shape[0] != tokens:
        return f"routing_map has {ids.shape[0]} tokens, hidden_states {tokens}"
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        return f"routing_map is of {ids.dtype}; expected expert ids, of an integer dtype"
    if hidden.dtype not in DTYPES:
        travels = ", ".join(map(str, DTYPES))
        return f"hidden_states of {hidden.dtype} cannot be dispatched; expected {travels}"
    if not probs.is_floating_point():
        return f"probs is of {probs.dtype}; expected a floating dtype"
    if probs.device != hidden.device or ids.device != hidden.device:
        return f"hidden_states is on {hidden.device}, probs on {probs.device}, ids on {ids.device}"
    if tp_group is not None and hidden.shape[-1] % tp_group.size():
        return f"{hidden.shape[-1]} features cannot be split over {tp_group.size()} ranks"
    return ""
