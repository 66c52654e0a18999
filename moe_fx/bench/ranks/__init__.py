"""``moe-fx bench --device cuda`` under torchrun: MoE layers on several GPUs of one host.

In: layers, numbers of tokens a rank, how evenly they use experts. Out: `points.RankPoint` of each,
a table and JSON. `programs` makes what is compared, `measure` checks and times it on all ranks,
`run` is the command. A new program: the table of `programs`.
"""
