"""What is put into hmc in a process with played GPUs, before a check: marks of steps in the log,
and values where its control flow reads what kernels would have computed.

Where tokens go: to experts in turn, as many to each. Values that a graph would compute are written
at every replay.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from gpu.fake import launches, log
from gpu.fake.machine import here
from hmc.errors import MachineError
from hmc.plan import Step
from hmc.runtime.device_ops import DEVICE_OPS, attention, exchange
from hmc.runtime.device_ops.base import Bound, Sorted, Work
from hmc.runtime.device_ops.gpu import routed
from hmc.runtime.device_ops.gpu.table import TRITON_OPS
from hmc.runtime.device_ops.shares import Call
from hmc.runtime.devices.cuda import CudaBackend, CudaStream
from hmc.runtime.devices.cuda_flags import StreamMemory
from hmc.runtime.schedule.runner import ScheduleRunner

_STRIDE = 7  # between the experts of a token: prime to the numbers of experts that there are
_NUMBERS: dict[torch.dtype, type[np.generic]] = {
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float32: np.float32,
}


class _Written(threading.local):
    """What a thread wrote since it last began a capture or ended a step."""

    def __init__(self) -> None:
        self.all: list[Callable[[], None]] = []


_written = _Written()


def install() -> None:
    """Put everything in its place; once."""
    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN would launch by ways that nobody plays
    TRITON_OPS["route"], DEVICE_OPS["copy"] = _route, _copy
    _set(Sorted, "__init__", _sorted(Sorted.__init__))
    _set(CudaStream, "graph", _graph(CudaStream.graph))
    _set(ScheduleRunner, "_hand_over", _marked(ScheduleRunner._hand_over))
    _set(CudaBackend, "cpu_done", _waiting(CudaBackend.cpu_done))
    if here().sanitized:
        _for_the_sanitizer()
        launches.install()


def _set(owner: Any, name: str, value: Any) -> None:
    setattr(owner, name, value)


# -- values ----------------------------------------------------------------------------------------


def _write(tensor: torch.Tensor, values: Any) -> None:
    """Write values into a tensor wherever it lies, now and at replays of what is captured now."""
    write = partial(_poke, tensor, values)
    write()
    _written.all.append(write)


def _poke(tensor: torch.Tensor, values: Any) -> None:
    if not tensor.numel():
        return
    size = tensor.element_size()
    strides = [stride * size for stride in tensor.stride()]
    length = size + sum((n - 1) * by for n, by in zip(tensor.shape, strides, strict=True))
    raw = memoryview((ctypes.c_uint8 * length).from_address(tensor.data_ptr()))
    flat = np.frombuffer(raw, _NUMBERS[tensor.dtype])
    there = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides)
    np.copyto(there, values, casting="unsafe")


def _chosen(rows: int, width: int, experts: int) -> Any:
    return np.arange(rows * width).reshape(rows, width) * _STRIDE % experts


def _route(bound: Bound, step: Step) -> Work:
    """Each token chooses other experts, and weighs them alike."""
    work, share = routed.route(bound, step), bound.share(step)
    ids, weights = (bound.tensor(step.outputs[role]) for role in ("ids", "routing"))
    experts = int(step.attrs["experts"])

    def both(call: Call) -> None:
        work(call)
        count = call.count(share)
        _write(ids[:count], _chosen(count, ids.shape[1], experts))
        _write(weights[:count], 1 / weights.shape[1])

    return both


def _copy(bound: Bound, step: Step) -> Work:
    """Integers that the host is to read: choices, whatever way they took."""
    work, share = exchange.copy(bound, step), bound.share(step)
    read = [bound.tensor(each) for each in step.outputs.values() if bound.place(each) == "host"]
    choices = [tensor for tensor in read if tensor.dtype == torch.int32]
    experts = bound.plan.model.experts

    def both(call: Call) -> None:
        work(call)
        for tensor in choices:
            count = call.count(share)
            _write(tensor[:count], _chosen(count, tensor.shape[1], experts))

    return both


def _sorted(real: Any) -> Any:
    """Slots as they come, and as many of each expert."""

    def init(self: Sorted, *given: Any) -> None:
        real(self, *given)
        slots, edges = self.slots, self.edges
        _write(slots, np.arange(slots.numel()).reshape(slots.shape))
        _write(edges, np.arange(edges.numel()) * slots.numel() // (edges.numel() - 1))

    return init


def _graph(real: Any) -> Any:
    def graph(self: CudaStream, works: Sequence[Work], label: str) -> Callable[[], None]:
        _written.all = []
        replay = real(self, works, label)
        written = _written.all

        def both() -> None:
            replay()
            for write in written:
                write()

        return both

    return graph


# -- marks -----------------------------------------------------------------------------------------


def _marked(real: Any) -> Any:
    """Steps of the log carry the step's label and its stream's name."""

    def hand_over(self: ScheduleRunner, step: Any, *given: Any) -> None:
        log.begin_step(f"{step.label} on {step.stream.name}")
        try:
            real(self, step, *given)
        finally:
            log.begin_step("")
            _written.all = []

    return hand_over


def _waiting(real: Any) -> Any:
    """Where no words of memory are to be had, the thread that hands over waits in Python."""

    def cpu_done(self: CudaBackend, event: Any) -> None:
        log.stopped("waits for the CPU")
        real(self, event)

    return cpu_done


# -- PyTorch's sanitizer ---------------------------------------------------------------------------


def _for_the_sanitizer() -> None:
    """It knows neither words of memory nor events that are asked after, and takes no mask that is
    a class of its own: events and whole masks stand in for these."""
    synchronize = CudaBackend.synchronize

    def no_words(self: StreamMemory) -> None:
        raise MachineError("the sanitizer sees no words of memory")

    def synchronized(self: CudaBackend, streams: Any = None) -> None:
        synchronize(self, streams)
        for number in range(len(self.devices)):
            torch.cuda.synchronize(number)

    def whole(tokens: int, total: int) -> torch.Tensor:
        return torch.zeros(tokens, total, device="cuda", dtype=torch.bfloat16)

    _set(StreamMemory, "__init__", no_words)
    _set(CudaBackend, "synchronize", synchronized)
    _set(attention, "_lower_right", whole)
