"""Strategies: how rows travel between tokens and experts.

In: a region and a plan. Out: nodes of the dialect, from tokens to the region's result
(``TRAVEL[plan.strategy]`` in `alltoall`, `even`, `mc2`), written with an `emitter`. `fitting` says
which strategies a region can have.

To add a strategy: a file here with its function of an `Emitter`, a line in ``TRAVEL``, its limits
in `fitting`, its price in `moe_fx/cost/layer.py`.
"""
