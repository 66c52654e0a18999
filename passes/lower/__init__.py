"""Lower: dialect ops become ops of the device.

In: a graph as the base compiler runs it. Out: the same, with the device's ops where their limits
allow; what stays says why. A device brings its table of lowerings (`moe_fx/devices`).
"""
