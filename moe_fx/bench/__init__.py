"""``moe-fx bench --device cuda``: MoE layers on one GPU, moe_fx beside what a user has without it.

In: names of layers or a transformers config. Out: `results.Point`, a table and JSON. `selection` is
what is asked for, `run` does it; `layer_runs` and `model_runs` measure, on a `machine.Machine`. A
new layer or model: the tables of `layers`.
"""
