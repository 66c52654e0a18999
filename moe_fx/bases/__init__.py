"""Base compilers: what Inductor and others are given beside a rewritten graph, so that they keep
its order and sum gradients as it needs.
"""
