"""CUDA GPUs: a local layer's experts in one op, with kernels of its own."""
