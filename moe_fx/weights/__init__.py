"""Experts' weights: which parameters they are, a rank's shards of them, and how they are read,
trained and saved.

`shard` is the public way in. `expert_parameters` finds the parameters, `shards` cuts them,
`unshard` makes a shard read as the whole, `checkpoint` and `pretrained` read a rank's share of
files, `data_parallel`, `clip` and `whole` are for training and saving.
"""
