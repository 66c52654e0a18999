"""What the router computes: logits -> weights and ids, with options that a fused op knows.

In: a region. Out: its `Router`, proved by running both. To add a score function: `scores`.
"""
