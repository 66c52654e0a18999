"""Triton kernels of a layer's experts and router. Imported where there is a GPU, or Triton's
interpreter (``TRITON_INTERPRET=1``) stands in for one.

A module is one step of a layer: `sort` (pairs by expert), `gate` (router), `gemm` (matmuls that
gather their rows), `rows` (what is left: gather, activation, weighted sum). Each has functions that
take tensors and launch; what runs when is decided in `moe_fx.devices.cuda.experts`.
"""
