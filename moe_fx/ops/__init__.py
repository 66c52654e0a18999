"""The dialect: ``torch.ops.moe_fx.*``. Importing this package registers the ops.

| op | meaning |
|---|---|
| ``route`` | router logits to weights and expert ids (gating top-k) |
| ``expert_counts`` | tokens per expert |
| ``permute`` / ``unpermute`` | rows sorted by expert, stable / weighted sum back in token order |
| ``exchange_counts`` / ``split_sizes`` | the one small exchange / sizes on the host (a sync) |
| ``all_to_all`` / ``wait`` | start of the row exchange / its end (``wait_after``: in this place) |
| ``chunk_keys`` | what pairs are sorted by where they travel in chunks |
| ``cut_rows`` | as ``split_sizes``, from all ranks' counts, of pieces of as many rows |
| ``permute_chunks`` / ``unpermute_chunks`` | as ``permute`` / ``unpermute``, rows in chunks |
| ``permute_cut`` | as ``permute_chunks``, chunks as ``cut_rows`` has cut them |
| ``regroup`` | received rows, by source rank, to rows by local expert |
| ``arrived_experts`` | the local expert of each row as rows arrive |
| ``permute_padded`` / ``regroup_padded`` | as ``permute`` / ``regroup``, in buffers of fixed size |
| ``permute_local`` | rows of the own experts, from every rank's tokens |
| ``rank_slices`` / ``row_experts`` | every rank's rows in slices / the expert of each row |
| ``even_sizes`` | that ranks exchange equal parts, checked; the sizes on the host, without a sync |
| ``dispatch_counts`` / ``gather_counts`` | counts with a status / those of all ranks |
| ``checked_sizes`` | as ``split_sizes``; an error on all ranks if one's status is bad |
| ``distribute`` / ``collect`` | all of the way to the experts / and back, in one op (MC2) |
| ``direct_dispatch`` / ``direct_combine`` | a token once to each rank of its experts / back |
| ``direct_experts`` | both, and the experts between them, in one op |
| ``exchange`` / ``keep`` | an exchange in one op / keeps buffers from being freed |
| ``remember`` | the same ids, kept from forward for backward (`moe_fx.capture.recompute`) |
| ``gating_top_k`` | as ``route``, whole; ``gating_top_k_training``: with gradients |
| ``grouped_mm`` | each expert's rows times that expert's weight |
| ``grouped_mm_list`` | the same, the weights being tensors of their own |
| ``fused_experts`` | a local layer's experts whole: rows, matmuls, activation, weighted sum |
| ``fused_experts_training`` | the same, with what its backward reads |
"""

from __future__ import annotations

from moe_fx.ops import (
    checked,
    chunks,
    cuts,
    direct,
    distribute,
    exchange,
    experts,
    fused,
    padded,
    routing,
)

__all__ = [
    "checked",
    "chunks",
    "cuts",
    "direct",
    "distribute",
    "exchange",
    "experts",
    "fused",
    "padded",
    "routing",
]
