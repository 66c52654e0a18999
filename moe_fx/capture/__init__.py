"""Capture: from Dynamo's graph to functional ATen, as the passes read it.

Contract. In: what Dynamo hands to a backend. Out: one graph of functional ATen for the same inputs,
which computes the same under the caller's autocast and gradient modes. `NotFunctional` where there
is none (a tensor subclass, a mutation that cannot be taken out).

To add: an op that must stay closed while tracing -> `opaque`; a higher-order op whose body is to be
seen -> `bodies`.
"""
