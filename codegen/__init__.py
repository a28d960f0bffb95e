"""Kernels: a `KernelSpec` becomes LLVM IR, machine code and a callable address; nothing here knows
models or plans.
"""
