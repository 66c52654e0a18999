"""Tools on FX graphs, which know nothing of MoE: what the passes, and capture before them, read and
change graphs with.

In: a `torch.fx.Graph` of functional ATen, every node with ``meta["val"]``. `nodes` reads one node;
`flow`, `names`, `selectors`, `parameters` and `gathers` look around it; `contraction`,
`feature_dims` and `per_expert` say what an op does along its dims; `lineage` what a table is made
of; `copy` and `splice` make and join graphs. A rule that does not hold is a `refusal.Refusal`.

To add: what an op does to the entries of each expert -> `per_expert`; a new op that picks indices
-> `selectors`.
"""
