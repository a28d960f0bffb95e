"""Giving memory back that nobody uses any more, after what held it has been closed."""

from __future__ import annotations

import ctypes
import gc
import sys


def release() -> None:
    """Collect what only refers to itself, and hand what the allocators keep of it (of the C library
    and, where PyTorch drives GPUs here, of the GPUs) back to the system.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
