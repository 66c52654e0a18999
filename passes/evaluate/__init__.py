"""Pieces of a graph, run on values: what proofs are made with.

In: nodes of a graph. Out: their values for inputs that are typical of their use (`typical`, `uses`,
`sizes`), on the host (`on_host`), with gradients (`gradients`), on ranks that are simulated
(`simulate`). `compare` says what counts as equal, and which results tell anything.

To add: what a kind of input typically holds -> `typical`.
"""
