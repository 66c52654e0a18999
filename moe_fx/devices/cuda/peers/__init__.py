"""GPUs of one host that write to each other's memory: strategy "direct" (`moe_fx.ops.direct`).

`board` tells the hosts how many tokens each rank has, `pool` holds the memory that ranks write to
and hears of ranks that did not come, `reach` says which groups can do it at all, `ops` are the
dialect's ops by the kernels of `moe_fx.devices.cuda.kernels.peers`.
"""
