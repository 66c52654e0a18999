"""Ascend NPUs: the dialect lowered to torch_npu's ops, run by npugraph_ex or torchair.

Verified against the host code of torch_npu 2.13 (schemas, meta kernels, compilers) and, by value,
against CPU kernels written from its documentation; not on Ascend hardware (docs/ascend.md).
"""
