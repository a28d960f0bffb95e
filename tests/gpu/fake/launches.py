"""Tells PyTorch's stream sanitizer, which sees what goes through the dispatcher alone, of hmc's
Triton launches: what of their arguments they read, and what they write.

Kernels of experts read weights whose addresses are in a table: here the table is read, in the
memory of the GPU that is played, and the weights are told as read.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hmc.codegen.triton import compiling

WRITTEN = {
    "linear": ("y", "partials", "counters"),
    "experts_act": ("act",),
    "experts_down": ("y",),
    "experts_down_few": ("y", "partials", "counters"),
    "bounds": ("found",),
    "terms": ("codes", "scales"),
    "attend": ("y", "partials", "counters"),
    "attend_prompt": ("y",),
    "absorb": ("wide",),
    "lift": ("y",),
    "append": ("caches",),
    "norm": ("y",),
    "add_norm": ("h_out", "y"),
    "rotary": ("x",),
    "route": ("ids", "routing"),
    "sorted_few": ("order", "edges"),
    "histogram": ("counts",),
    "scanned": ("counts", "totals", "edges", "counter"),
    "placed": ("order",),
}
"""By kernel, the arguments that it writes, or reads and writes."""
TABLE = "table"
"""The argument that holds addresses."""

races: list[str] = []
"""Kernels at whose launch a race was seen."""

Run = Callable[..., Any]


def install() -> None:
    """Before any kernel is made."""
    sanitizer: Any = importlib.import_module("torch.cuda._sanitizer")
    vars(compiling)["_run"] = _told(compiling._run, sanitizer)


def _told(real: Run, sanitizer: Any) -> Run:
    def run(made: Run, *args: Any, warmup: bool, **options: Any) -> Any:
        found = real(made, *args, warmup=warmup, **options)
        if not (warmup or compiling._ahead.get()):
            kernel: Any = made.__self__  # type: ignore[attr-defined]
            _tell(sanitizer, kernel.__name__, dict(zip(kernel.arg_names, args, strict=False)))
        return found

    return run


def _tell(sanitizer: Any, name: str, given: dict[str, Any]) -> None:
    """Raises what the sanitizer raises for a race."""
    aliases: dict[int, list[str]] = {}
    read, written = set[int](), set[int]()
    missing = [each for each in WRITTEN[name] if each not in given]
    assert not missing, f"{name} has no {missing}"
    for argument, value in given.items():
        for address in _addresses(argument, value):
            aliases.setdefault(address, []).append(argument)
            (written if argument in WRITTEN[name] else read).add(address)
    errors = sanitizer.cuda_sanitizer.dispatch.event_handler._handle_kernel_launch(
        torch.cuda.current_stream().cuda_stream, read - written, written, set(), name, aliases
    )
    if errors:
        races.append(name)
        raise sanitizer.CUDASanitizerErrors(errors)


def _addresses(argument: str, value: Any) -> Iterator[int]:
    """Where the tensors of an argument begin, and what a table of them holds."""
    if isinstance(value, tuple):
        for each in value:
            yield from _addresses(argument, each)
    elif isinstance(value, torch.Tensor) and value.numel():
        yield value.data_ptr()
        if argument == TABLE:
            yield from (ctypes.c_int64 * value.numel()).from_address(value.data_ptr())
