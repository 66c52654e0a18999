"""Ways in: the backend of torch.compile, the pass for other compilers' hooks, and `explain`.

Each parses options, captures, runs the passes (`moe_fx.passes`) and hands the result on, with a net
under it (`net`) and away from whatever state the caller is in (`ambient`). `tracing` stands around
Dynamo for the frames that are ours; `announce` and `progress` say what was compiled, `costly` what
a declined layer costs, `strict` what is refused.
"""
