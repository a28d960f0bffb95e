"""Launches of the kernels of codegen/triton on PyTorch's tensors."""
