"""How Triton compiles hmc's kernels: when they are launched, or before, by several threads.

with compiling(progress):       # launches in here run nothing
    works(call)                 # what they would launch is compiled, and loaded at the end
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextvars import ContextVar
from functools import partial
from types import FunctionType
from typing import Any, Literal

from hmc import env
from hmc.errors import KernelError

Progress = Callable[[str, int, int], None]

ANY_NUMBER = ("tokens", "height", "parts", "first_slot", "experts", "all_experts", "steps", "past",
              "before", "splits", "table_stride", "slots", "chunks")  # fmt: skip
"""Arguments that kernels are not compiled anew for: those that vary from call to call."""
ANY_ADDRESS = ("slots", "edges", "begins", "ends", "ids", "table", "totals")
"""Pointers that may be at any address, and are not read in haste."""

_ahead: ContextVar[Literal["", "compile", "load"]] = ContextVar("hmc_ahead", default="")
"""What a launch does instead of launching."""


def jit(function: FunctionType) -> Any:
    """A kernel or a device function, compiled by Triton where it is launched."""
    made = importlib.import_module("triton").jit(
        function, do_not_specialize=ANY_NUMBER, do_not_specialize_on_alignment=ANY_ADDRESS
    )
    made.run = partial(_run, made.run)
    return made


def _run(run: Callable[..., Any], *args: Any, warmup: bool, **options: Any) -> Any:
    ahead = _ahead.get()
    kernel = run(*args, warmup=warmup or bool(ahead), **options)
    if ahead == "load" and kernel is not None:
        _told(partial(getattr, kernel, "run"))
    return kernel


class _Threads(ThreadPoolExecutor):
    """Remembers what it was given."""

    def __init__(self) -> None:
        super().__init__(env.threads(), "hmc-triton")
        self.given: list[Future[Any]] = []

    def submit(self, *args: Any, **options: Any) -> Future[Any]:
        self.given.append(super().submit(*args, **options))
        return self.given[-1]


def make_ready(launches: Callable[[], object], progress: Progress | None = None) -> None:
    """Compile the kernels that `launches` launches in this thread for the current GPU, unless they
    are known, and load them onto it; none is run. It is called twice.

    `progress(what, done, total)` counts those compiled. Raises `KernelError` with what Triton says.
    """
    triton = importlib.import_module("triton")
    token = _ahead.set("compile")
    try:
        with _Threads() as threads, triton.AsyncCompileMode(threads, ignore_errors=True):
            launches()
            for done, each in enumerate(as_completed(threads.given), 1):
                _told(each.result)
                if progress is not None:
                    progress("compiling kernels", done, len(threads.given))
        _ahead.set("load")
        launches()
    finally:
        _ahead.reset(token)


def _told(do: Callable[[], Any]) -> None:
    try:
        do()
    except Exception as error:
        first, *_, last = f"{type(error).__name__}: {error}\n".splitlines() * 2  # what, ..., why
        told = first if first == last else f"{first} {last.strip()}"
        raise KernelError(f"a kernel of the GPU cannot be made: {told}") from error
