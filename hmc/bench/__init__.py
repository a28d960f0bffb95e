"""Measuring: kernels and whole models against what this machine's memory and arithmetic give at
best, in the same minutes.

    compare.py     measured thing and reference take turns; medians of pairwise ratios
    bandwidth.py   the references: the best streaming read of a sweep, register-only multiply-adds
    cases.py       which kernel, format and shape
    kernels.py     measures them, on weights far beyond the caches
    model.py       prefill and decode of a plan
"""
