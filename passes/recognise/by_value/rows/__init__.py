"""Experts' bodies by rows: which dims of a captured tensor are features, and which tell rows apart.

In: the nodes between tokens and result, on tensors of any shape. Out: the same body on ``[S, ...]``
rows and ``[E, ...]`` tables, or a `Refusal`.

To add an op: `layout_moves` if it moves entries, `layout_matmuls` if it multiplies matrices.
"""
