"""What a layer costs: the seconds that compute and exchange take, and which plan takes the fewest.

`rates` and `link` measure the device and the connection once; `layer` predicts one MoE layer from
them, `pipeline` how its chunks overlap; `decide` makes all ranks decide alike.
"""
