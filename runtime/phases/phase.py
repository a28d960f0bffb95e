"""Phases that compute on GPUs: devices, the plan's memory on them and one runner a phase, behind
the face of a phase on the CPU.

`DevicePhases` opens the devices a plan asks for (GPUs by CUDA, or `host`: GPUs played by threads
and CPU memory of the same size) and owns them; a `DevicePhase` is what an executor runs. An error
in a step closes the devices: what follows needs the plan opened again.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import numpy.typing as npt
import torch

from hmc import env
from hmc.closing import Closing
from hmc.codegen.triton.compiling import Progress
from hmc.errors import MachineError
from hmc.ops import OPS
from hmc.plan import Phase, Plan, Step
from hmc.plan.memory import device_of, kind_of
from hmc.plan.phases import BESIDE
from hmc.runtime.binding.phase import Binding, BoundPhase
from hmc.runtime.binding.warm import warm
from hmc.runtime.device_ops.base import Work
from hmc.runtime.device_ops.shares import Call, Ints
from hmc.runtime.devices.base import Backend
from hmc.runtime.devices.cuda import CudaBackend
from hmc.runtime.devices.host import HostBackend
from hmc.runtime.host.lowering import Parts
from hmc.runtime.host.trace import Recorder
from hmc.runtime.phases.choice import Devices
from hmc.runtime.phases.decode_graphs import DecodeGraphs
from hmc.runtime.ranks.group import GroupRunner, RankGroup
from hmc.runtime.routing import RoutingRecorder
from hmc.runtime.schedule.crossing import crossing
from hmc.runtime.schedule.host_program import HostProgram
from hmc.runtime.schedule.runner import Measured, ScheduleRunner


def plays_gpus(devices: Devices | Backend) -> bool:
    """Whether GPUs are played, in memory of the host."""
    return devices == "host" or isinstance(devices, HostBackend)


def open_devices(
    plan: Plan,
    phases: Sequence[Phase],
    choice: Devices,
    *,
    shared: bool = False,
) -> Backend:
    """Devices for `phases` of a plan. GPUs that are played have the memory of the plan's; `shared`,
    other processes can use it.

    Raises `MachineError` where GPUs are missing.
    """
    named = {device_of(step.resource) for phase in phases for step in phase.steps} - {"host"}
    gpus = 1 + max(int(name.removeprefix("gpu")) for name in named)
    if choice == "host":
        sizes = [gpu.memory_bytes for gpu in plan.machine.gpus[:gpus]]
        return HostBackend(gpus, sizes, shared=shared)
    try:
        return CudaBackend(gpus)
    except MachineError as error:
        raise MachineError(
            f"{error}. The plan is for {plan.machine.name}: compile one with --machine auto, or run"
            " it with --devices host, which lets the CPU play the GPUs (slowly)"
        ) from error


class DevicePhase:
    """One phase, ready to run: `bound` is its memory and what its steps do. `last` says when they
    ran in the latest recorded call. A call of `prefill.beside` may be made by another thread while
    this one makes calls of decode phases; otherwise one call at a time.

    With a `group`, a phase that is bound with its link runs on all ranks. In phases of decode GPUs
    are handed graphs where `HMC_GRAPHS` asks for it (by default on CUDA); recorded calls and those
    whose routing is counted go step by step."""

    def __init__(
        self,
        bound: BoundPhase,
        backend: Backend,
        routing: RoutingRecorder | None = None,
        group: RankGroup | None = None,
    ) -> None:
        self.name = bound.phase.name
        self.max_tokens = bound.max_tokens
        self.ran = False
        self.last: Measured | None = None
        self.bound = bound
        self._recorder: Recorder | None = None
        works = list(bound.works) if routing is None else _counted(bound, routing)
        self.runner: ScheduleRunner | GroupRunner
        self.program: HostProgram | None = None
        self.graphs: DecodeGraphs | None = None
        """None: every step is handed over by itself."""
        self._meeting = ""
        if kind_of(bound.phase) == "decode":
            self.program, self._meeting = _program(bound, backend)
        if group is None or bound.link is None:
            self.runner = ScheduleRunner(
                bound.phase,
                backend,
                works,
                program=self.program,
                aside=bound.phase.name == BESIDE,
            )
            wanted = env.graphs(default=isinstance(backend, CudaBackend))
            if self.runner.segments and wanted and routing is None:
                self.graphs = DecodeGraphs(bound, self.runner)
        else:
            self.runner = GroupRunner(group, bound, backend, works)

    @property
    def handover(self) -> str:
        """In words, how the CPU and the devices of a decode phase wait for each other, and whether
        GPUs are handed graphs: that may change when the first ones are made."""
        return "; ".join(filter(None, (self._meeting, self.graphs.told if self.graphs else "")))

    @property
    def kernels(self) -> tuple[str, ...]:
        """Symbols of the native kernels in this phase, and the names of what PyTorch computes."""
        known = self.bound.plan.kernels
        keys = {key for step in self.bound.phase.steps for key in step.kernels}
        return tuple(sorted(known[key].symbol if key in known else key for key in keys))

    @property
    def recorder(self) -> Recorder | None:
        """Where every call is stamped; None: nowhere."""
        return self._recorder

    @recorder.setter
    def recorder(self, recorder: Recorder | None) -> None:
        self._recorder = recorder
        for native in (*self.bound.native, *([self.program] if self.program else ())):
            native.recorder = recorder

    def run(
        self, ids: Ints, positions: Ints, tables: Ints, rows: Ints, best: Ints | None = None
    ) -> npt.NDArray[np.float32]:
        """As `LoweredPhase.run`, of all logits whatever is asked. Ctrl-C takes effect when the call
        is over, a second one at once; that closes the devices.
        """
        with _interrupts_held():
            call = self._run(ids, positions, tables, rows)
            self.ran = True
        return self.bound.logits(call)

    def _run(self, ids: Ints, positions: Ints, tables: Ints, rows: Ints) -> Call:
        recorder = self._recorder
        if recorder is None and self.graphs is not None and self.graphs.take(tables, rows):
            return self.graphs.run(ids, positions, tables, rows)
        call = self.bound.call(ids, positions, tables, rows)
        if recorder is None:
            self.runner.run_untimed(call)
        else:
            began = time.monotonic_ns()
            self.last = measured = self.runner.run(call)
            steps = self.bound.phase.steps
            recorder.scheduled(self.name, steps, measured.start, measured.finish, began)
        return call


class DevicePhases(Closing):
    """All phases of a plan that use GPUs, by name, and the devices; a context manager."""

    def __init__(
        self,
        parts: Parts,
        phases: Sequence[Phase],
        devices: Devices | Backend,
        *,
        routing: RoutingRecorder | None = None,
        gpus: int | None = None,
        directory: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Devices given from outside are closed with the rest. With `gpus` > 1 the phase that GPUs
        share is run by as many processes, one a GPU: this one and others, which share `store` or
        map the shards in `directory`. Raises `MachineError`, `CapacityError` naming what does not
        fit, `KernelError`, and what `RankGroup` raises.
        """
        with ExitStack() as stack:
            backend = (
                open_devices(parts.plan, phases, devices, shared=(gpus or 1) > 1)
                if isinstance(devices, str)
                else devices
            )
            stack.callback(backend.close)
            cuda = isinstance(backend, CudaBackend)
            group = None
            if gpus is not None and gpus > 1 and any(phase.ranks > 1 for phase in phases):
                group = stack.enter_context(
                    RankGroup(
                        parts.plan,
                        "cuda" if cuda else "host",
                        store=parts.store,
                        directory=directory,
                        threads=max(1, parts.pool.workers // gpus),
                    )
                )
            binding = stack.enter_context(
                Binding(
                    parts,
                    backend.devices,
                    names=[phase.name for phase in phases],
                    pin=cuda,
                    link=None if group is None else group.link,
                )
            )
            self.phases = {
                name: DevicePhase(bound, backend, routing, group)
                for name, bound in binding.phases.items()
            }
            warm(binding.phases.values(), backend, progress)
            if group is not None:
                group.begin(binding.lend(), backend.devices[0].torch_device)
            self.pinned = binding.pinned
            self._backend = backend
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(parts.pool.workers)
            self._stack = stack.pop_all()

    @property
    def handover(self) -> str:
        """What the phases say of theirs."""
        return "; ".join(filter(None, (phase.handover for phase in self.phases.values())))

    def give_up(self) -> None:
        """End the streams whatever they do: calls under way raise `ExecutionError`."""
        self._backend.close()

    def close(self) -> None:
        """End the streams and free all memory; a second call does nothing."""
        phases, self.phases = self.phases, {}
        self._stack.close()
        for phase in phases.values():
            phase.graphs = None  # their memory is the device's, too


def _program(bound: BoundPhase, backend: Backend) -> tuple[HostProgram | None, str]:
    """The CPU's steps of a phase as one program, and in words whether there is one."""
    across = crossing(bound.phase)
    if across is None:
        return None, ""
    count, steps = len(across.flags), len(across.steps)
    try:
        flags = backend.flags(count)
    except MachineError as error:
        return None, f"{bound.phase.name}: CPU and GPUs wait for each other in Python, for {error}"
    return (
        bound.program(across, flags),
        f"{bound.phase.name}: {steps} CPU steps in one native program, {count} flags to and from"
        " GPUs",
    )


def _counted(bound: BoundPhase, routing: RoutingRecorder) -> list[Work]:
    """The works, with what routers chose told to `routing`: by the first GPU alone where several
    route all tokens."""

    def told(step: Step, work: Work) -> Work:
        ids, share = bound.tensor(step.outputs["ids"]), bound.share(step)
        experts = int(step.attrs["experts"])

        def both(call: Call) -> None:
            work(call)
            if count := call.count(share):
                routing.count(step.layer, experts, ids[:count].cpu().numpy())

        return both

    routers = [step for step in bound.phase.steps if OPS[step.op].everywhere]
    first = min((step.resource for step in routers), default="")
    return [
        told(step, work) if OPS[step.op].everywhere and step.resource == first else work
        for step, work in zip(bound.phase.steps, bound.works, strict=True)
    ]


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold the first Ctrl-C back until the end of the block: devices cannot go on after half a
    call. Where Ctrl-C is somebody else's business, or comes to another thread, nothing changes.
    """
    before = signal.getsignal(signal.SIGINT)
    main = threading.current_thread() is threading.main_thread()
    if not main or before is not signal.default_int_handler:
        yield
        return
    seen = 0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if seen:
        raise KeyboardInterrupt
