"""What torch_npu's MoE ops take, checked before one is emitted.

The meta kernels of torch_npu 2.13 accept calls that the device refuses or computes wrongly: grouped
matmuls of other inner sizes, an int32 ``group_list``, odd widths of a SwiGLU. So every op that a
lowering emits is checked here, and one that violates a rule is not emitted.

Sources of the rules: the docstrings that torch_npu 2.13 carries (``_op_plugin_docs.py``); for MC2
the op-plugin page of ``npu_moe_distribute_dispatch`` (torch_npu 7.0). A size that is symbolic
when the graph is compiled can't break a rule here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_HALVES = (torch.float16, torch.bfloat16)
_MOST_PAIRS = 16777215
_INNER_LIMIT = 65536
_MOST_GROUPS = 1024
_MOST_TENSORS = 128
_MOST_GATED_EXPERTS = 2048
_MOST_ROUTED_EXPERTS = 10240

Rule = Callable[..., Iterator[str]]


def violations(op: str, args: Sequence[Any], kwargs: dict[str, Any]) -> list[str]:
    """What is wrong with calling ``npu::op`` so; ``args``: tensors (fake ones do) and numbers.

    Raises `KeyError` for an op that has no rules: none is emitted unchecked.
    """
    return list(_RULES[op](*args, **kwargs))


def checked_ops() -> frozenset[str]:
    """The ops that have rules."""
    return frozenset(_RULES)


def _known(size: Any) -> int | None:
    """None: symbolic."""
    return size if isinstance(size, int) else None


def _at_most(size: Any, most: int, what: str) -> Iterator[str]:
    known = _known(size)
    if known is not None and known > most:
        yield f"{what} is {known}, at most {most} are supported"


def _is(tensor: Tensor, dims: int, dtypes: Sequence[torch.dtype], what: str) -> Iterator[str]:
    if tensor.dim() != dims:
        yield f"{what} has {tensor.dim()} dimensions, expected {dims}"
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        yield f"{what} is {str(tensor.dtype).removeprefix('torch.')}, expected {names}"


def _differ(one: Any, other: Any) -> bool:
    return _known(one) is not None and _known(other) is not None and one != other


def _token_permute(tokens: Tensor, indices: Tensor, num_out_tokens: Any = None) -> Iterator[str]:
    yield from _is(tokens, 2, _FLOATS, "tokens")
    yield from _is(indices, 2, (torch.int32, torch.int64), "indices")
    yield from _at_most(indices.numel(), _MOST_PAIRS, "the number of pairs")
    yield from _at_most(indices.shape[-1], 512, "top_k")
    if _differ(tokens.shape[0], indices.shape[0]):
        yield f"{tokens.shape[0]} tokens, but ids of {indices.shape[0]}"
    if num_out_tokens is not None and not isinstance(num_out_tokens, int):
        yield "num_out_tokens must be known when the graph is compiled"


def _token_unpermute(
    permuted_tokens: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
) -> Iterator[str]:
    yield from _is(permuted_tokens, 2, _FLOATS, "permuted_tokens")
    yield from _is(sorted_indices, 1, (torch.int32,), "sorted_indices")
    if probs is not None:
        yield from _is(probs, 2, (permuted_tokens.dtype,), "probs")
        yield from _at_most(probs.shape[-1], 512, "top_k")
        if _differ(probs.numel(), sorted_indices.numel()):
            yield f"{probs.numel()} weights for {sorted_indices.numel()} pairs"


def _token_permute_grad(
    grad: Tensor,
    sorted_indices: Tensor,
    tokens_size_0: Any,
    tokens_dtype: torch.dtype,
    num_topk: Any,
) -> Iterator[str]:
    yield from _is(grad, 2, _FLOATS, "grad_permuted_tokens")
    yield from _is(sorted_indices, 1, (torch.int32,), "sorted_indices")
    if tokens_dtype != grad.dtype:
        yield f"gradients are {grad.dtype}, tokens {tokens_dtype}"
    yield from _at_most(num_topk, 512, "top_k")


def _token_unpermute_grad(
    permuted_tokens: Tensor,
    grad: Tensor,
    sorted_indices: Tensor,
    probs: Tensor | None = None,
) -> Iterator[str]:
    yield from _token_unpermute(permuted_tokens, sorted_indices, probs)
    yield from _is(grad, 2, (permuted_tokens.dtype,), "grad_unpermuted_tokens")


def _grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    group_list: Tensor,
    split_item: int,
    group_type: int,
    group_list_type: int,
) -> Iterator[str]:
    (rows,) = x
    if split_item not in (2, 3):
        yield f"split_item is {split_item}, expected 2 or 3 (one result)"
    if group_list_type not in (0, 1):
        yield f"group_list_type is {group_list_type}, expected 0 (ends) or 1 (sizes)"
    yield from _is(rows, 2, _FLOATS, "x")
    yield from _is(group_list, 1, (torch.int64,), "group_list")
    yield from _at_most(group_list.shape[0], _MOST_GROUPS, "the number of groups")
    yield from _at_most(len(weight), _MOST_TENSORS, "the number of weights")
    if group_type == 2:
        yield from _matmul_over_groups(rows, *weight)
        return
    if group_type != 0:
        yield f"group_type is {group_type}, expected 0 (rows) or 2 (the summed dimension)"
    one = len(weight) == 1
    groups = weight[0].shape[0] if one else len(weight)
    if _differ(groups, group_list.shape[0]):
        yield f"{groups} weights for {group_list.shape[0]} groups"
    if not one and rows.dtype == torch.float32:
        yield "float32 takes one stacked weight"
    for each in weight:
        yield from _is(each, 3 if one else 2, (rows.dtype,), "weight")
        if _differ(each.shape[-2], rows.shape[1]):
            yield f"x has {rows.shape[1]} features, weight takes {each.shape[-2]}"
        yield from _at_most(each.shape[-1], _INNER_LIMIT - 1, "the width of weight")
    yield from _at_most(rows.shape[1], _INNER_LIMIT - 1, "the width of x")


def _matmul_over_groups(rows: Tensor, other: Tensor) -> Iterator[str]:
    yield from _is(other, 2, (rows.dtype,), "weight")
    if _differ(rows.shape[1], other.shape[0]):
        yield f"x has {rows.shape[1]} columns, weight {other.shape[0]} rows"
    yield from _at_most(other.shape[-1], _INNER_LIMIT - 1, "the width of weight")


def _swiglu(rows: Tensor, dim: int = -1) -> Iterator[str]:
    if rows.dtype not in _FLOATS:
        yield f"input is {rows.dtype}"
    if not 1 <= rows.dim() <= 8:
        yield f"input has {rows.dim()} dimensions, expected 1 to 8"
    width = _known(rows.shape[dim])
    if width is not None and width % 2:
        yield f"input is {width} wide: it has no halves"


def _gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = 0,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> Iterator[str]:
    yield from _is(x, 2, _FLOATS, "x")
    experts = x.shape[-1]
    yield from _at_most(experts, _MOST_GATED_EXPERTS, "the number of experts")
    if bias is not None:
        yield from _is(bias, 1, (x.dtype,), "bias")
        if _differ(bias.shape[0], experts):
            yield f"{bias.shape[0]} biases for {experts} experts"
    if not 1 <= k_group <= group_count:
        yield f"{k_group} of {group_count} groups"
    if experts % group_count:
        yield f"{experts} experts do not divide by {group_count} groups"
    elif group_count > 1:
        each = experts // group_count
        if each <= 2:
            yield f"groups of {each} experts, more than 2 are expected"
        yield from _at_most(-(-each // 32) * 32 * group_count, _MOST_GATED_EXPERTS, "padded groups")
    if not 1 <= k <= experts // group_count * k_group:
        yield f"{k} of {experts // group_count * k_group} experts"
    if renorm != 0 or norm_type not in (0, 1) or group_select_mode not in (0, 1):
        yield "renorm must be 0, norm_type and group_select_mode 0 or 1"


def _gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> Iterator[str]:
    if x.dim() not in (2, 3) or x.dtype not in _FLOATS:
        yield f"x is {x.dtype} of {x.dim()} dimensions, expected a float of 2 or 3"
    if not 1 <= k <= min(int(x.shape[-1]), 1024):
        yield f"{k} of {x.shape[-1]} experts, at most 1024"


def _init_routing(
    x: Tensor,
    expert_idx: Tensor,
    *,
    active_num: int,
    expert_num: int,
    expert_tokens_num_type: int,
    expert_tokens_num_flag: bool,
    active_expert_range: Sequence[int],
    row_idx_type: int,
) -> Iterator[str]:
    yield from _is(x, 2, (*_FLOATS, torch.int8), "x")
    yield from _is(expert_idx, 2, (torch.int32,), "expert_idx")
    yield from _at_most(expert_num, _MOST_ROUTED_EXPERTS, "the number of experts")
    if expert_tokens_num_type not in (1, 2) or not expert_tokens_num_flag:
        yield "expert_tokens_num_type must be 1 or 2, expert_tokens_num_flag True"
    first, end = active_expert_range
    if not 0 <= first < end <= expert_num:
        yield f"experts {first} to {end} of {expert_num}"
    if row_idx_type not in (0, 1):
        yield "row_idx_type must be 0 or 1"


def _finalize_routing(
    rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int = 0,
    k: int = 1,
) -> Iterator[str]:
    yield from _is(rows, 2, _FLOATS, "expanded_permuted_rows")
    yield from _is(expanded_src_to_dst_row, 1, (torch.int32,), "expanded_src_to_dst_row")
    if scales is not None:
        yield from _is(scales, 2, (rows.dtype,), "scales")
    if drop_pad_mode != 2:
        yield "rows of npu_moe_init_routing_v2 need drop_pad_mode=2"


def _distribute_dispatch(
    x: Tensor,
    expert_ids: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
) -> Iterator[str]:
    yield from _is(x, 2, _HALVES, "x")
    yield from _is(expert_ids, 2, (torch.int32,), "expert_ids")
    if not 1 <= len(group_ep) < 128:
        yield f"the group's name has {len(group_ep)} characters, expected 1 to 127"
    if moe_expert_num % ep_world_size:
        yield f"{moe_expert_num} experts do not divide by {ep_world_size} ranks"
    if _differ(x.shape[0], expert_ids.shape[0]):
        yield f"{x.shape[0]} tokens, but ids of {expert_ids.shape[0]}"


def _distribute_combine(
    expand_x: Tensor,
    expert_ids: Tensor,
    assist_info_for_combine: Tensor,
    ep_send_counts: Tensor,
    expert_scales: Tensor,
    group_ep: str,
    ep_world_size: int,
    ep_rank_id: int,
    moe_expert_num: int,
) -> Iterator[str]:
    yield from _is(expand_x, 2, _HALVES, "expand_x")
    yield from _is(expert_ids, 2, (torch.int32,), "expert_ids")
    yield from _is(assist_info_for_combine, 1, (torch.int32,), "assist_info_for_combine")
    yield from _is(ep_send_counts, 1, (torch.int32,), "ep_send_counts")
    yield from _is(expert_scales, 2, (torch.float32,), "expert_scales")
    if moe_expert_num % ep_world_size:
        yield f"{moe_expert_num} experts do not divide by {ep_world_size} ranks"


_RULES: dict[str, Rule] = {
    "npu_moe_token_permute": _token_permute,
    "npu_moe_token_unpermute": _token_unpermute,
    "npu_moe_token_permute_grad_v2": _token_permute_grad,
    "npu_moe_token_unpermute_grad": _token_unpermute_grad,
    "npu_grouped_matmul": _grouped_matmul,
    "npu_swiglu": _swiglu,
    "npu_moe_gating_top_k": _gating_top_k,
    "npu_moe_gating_top_k_softmax": _gating_top_k_softmax,
    "npu_moe_init_routing_v2": _init_routing,
    "npu_moe_finalize_routing": _finalize_routing,
    "npu_moe_distribute_dispatch_v2": _distribute_dispatch,
    "npu_moe_distribute_combine_v2": _distribute_combine,
}
