"""A plan's phases bound to devices: memory for everything, and what each step does in a call.

    with Binding(parts, devices) as binding:
        phase = binding.phases["decode"]
        call = phase.call(ids, positions, tables, wanted)
        for work in phase.works:      # or a schedule runner, on the streams of the steps' resources
            work(call)
        phase.logits(call)

Hides arenas, slots, resident weights, caches, and which rows of a call a step works on. Order is
none of its business: `works` may run whenever the plan's events allow. One call of each kind
of phase at a time (hmc/plan/memory.py): phases of a kind share the same memory.

A phase shared by ranks keeps the cache on gpu0: other ranks read the past of a prompt's later calls
from there. With a `link` the other ranks are processes (runtime/ranks/): of such a phase the
link's rank alone is bound, and the past is sent to ranks that have no cache.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hmc.closing import Closing
from hmc.errors import ExecutionError
from hmc.ops import OPS, kept_by
from hmc.plan import DTYPE_BYTES, Buffer, Operand, Phase, Step
from hmc.plan.memory import HOME, device_of, wanted_rows
from hmc.runtime.binding.host import HostSteps
from hmc.runtime.binding.memory import TORCH_TYPES, GpuMemory, LentMemory
from hmc.runtime.binding.pinned import pin_weights
from hmc.runtime.binding.walk import walked
from hmc.runtime.binding.weights import Packed
from hmc.runtime.device_ops import Work
from hmc.runtime.device_ops.base import PlannedT, Routed
from hmc.runtime.device_ops.gpu.table import device_op
from hmc.runtime.device_ops.link import Link
from hmc.runtime.device_ops.matmul import Expert, Matrix
from hmc.runtime.device_ops.shares import ALL, Call, Fixed, Ints, Needs, Share, make_call
from hmc.runtime.device_ops.triton.launch import Workspace
from hmc.runtime.devices import pinned
from hmc.runtime.devices.flags import Flags
from hmc.runtime.devices.gpu import Gpu
from hmc.runtime.host.lowering import LoweredPhase, Parts
from hmc.runtime.memory.blocks import Block
from hmc.runtime.schedule.crossing import Crossing, is_native
from hmc.runtime.schedule.host_program import HostProgram
from hmc.runtime.schedule.runner import part_of_rank
from hmc.runtime.weights.torch_view import view

_LOGITS = "logits"
_CPU = torch.device("cpu")


class Binding(Closing):
    """Owns the device memory of a plan; a context manager, `close` frees all of it."""

    def __init__(
        self,
        parts: Parts,
        devices: Iterable[Gpu],
        *,
        names: Iterable[str] = (),
        pin: bool = False,
        link: Link | None = None,
        lent: LentMemory | None = None,
    ) -> None:
        """`names` are those of the phases to bind (default: all). With `pin`, host buffers and the
        weights that GPUs stream are pinned; with `link`, phases of several ranks are bound for the
        link's rank only: rank 0's process has the memory of all GPUs, and the others use what it
        has `lent` them. Raises `CapacityError` naming what does not fit, `ExecutionError` when a
        device that the plan computes on is missing, and `MachineError` where the system refuses to
        pin.
        """
        plan = parts.plan
        found = {device.name: device for device in devices}
        users: dict[str, list[Phase]] = {}
        own: dict[str, Phase] = {}
        for name in names or [phase.name for phase in plan.phases]:
            whole = plan.phase(name)
            own[name] = _part(whole, link)
            if link is not None and link.rank:
                whole = own[name]
            for place in {device_of(step.resource) for step in whole.steps} - {"host"}:
                users.setdefault(place, []).append(plan.phase(name))
        if missing := sorted(users.keys() - found.keys()):
            raise ExecutionError(f"the plan computes on {', '.join(missing)}: no such device")
        self.phases: dict[str, BoundPhase] = {}
        self.pinned = ""
        """What of the weights is pinned, in words; empty where nothing is."""
        self._memory: dict[str, GpuMemory] = {}
        with ExitStack() as stack:
            for name, phases in sorted(users.items()):
                mine = [own[phase.name] for phase in phases]
                self._memory[name] = GpuMemory(found[name], parts, phases, mine, lent)
                stack.callback(self._memory[name].close)
            for name, part in own.items():
                host = HostSteps(parts, part)
                stack.callback(host.close)
                phase = BoundPhase(parts, part, self._memory, host, link)
                stack.callback(phase.close)
                self.phases[name] = phase
                for address, size in phase.pinnable if pin else ():
                    pinned.pin(address, size)
                    stack.callback(pinned.unpin, address)
            # CUDA copies what is pinned, at the full rate of the bus, or what is not, but no memory
            # that is so in part: an arena is pinned whole, and first; of other homes pages are
            early = pin and parts.store.arena is not None
            if not early:
                self._fill()
            if pin:
                pieces = [piece for each in self._memory.values() for piece in each.streamed]
                self.pinned = pin_weights(parts.store, pieces, stack)
            if early:
                self._fill()
            self._stack = stack.pop_all()

    def lend(self) -> dict[int, LentMemory]:
        """By rank, the memory of its GPU, for its process."""
        return {
            int(name.removeprefix("gpu")): memory.lend()
            for name, memory in self._memory.items()
            if name != HOME
        }

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        self._stack.close()

    def _fill(self) -> None:
        for each in self._memory.values():
            each.fill()


class BoundPhase:
    """One phase: `works[i]` is what step i does in a call. Implements `device_ops.Bound`.

    With a `link`, the steps are those of one rank, and `works` go with the steps of `phase` as it
    is here.
    """

    def __init__(
        self,
        parts: Parts,
        phase: Phase,
        memory: Mapping[str, GpuMemory],
        host: HostSteps,
        link: Link | None = None,
    ) -> None:
        self.plan, self.kv, self.phase = parts.plan, parts.kv, phase
        self.max_tokens = phase.max_tokens
        self.sorted: Routed = {}
        self.link = link if phase.ranks > 1 else None
        self._past: dict[tuple[int, str], torch.Tensor] = {}
        self._planned: dict[Hashable, Any] = {}
        self._memory, self._host = memory, host
        self._buffers = {buffer.name: buffer for buffer in phase.buffers}
        self.max_wanted = wanted_rows(parts.plan, phase, phase.max_tokens)
        width = self._buffers[_LOGITS].width
        self._result = Block(4 * width * self.max_wanted, f"{phase.name} logits")
        self._logits = self._result.array.view(np.float32).reshape(self.max_wanted, width)
        self._shares, self._adding, self._holding = walked(phase)
        self._needs = self._needed()
        self.works: list[Work] = [self._bound(step) for step in phase.steps]

    def call(
        self,
        ids: Ints,
        positions: Ints,
        tables: Ints,
        wanted: Ints,
        fixed: Fixed | None = None,
    ) -> Call:
        """A call of i32 [T] tokens, their positions and block table rows, with logits of those at
        index `wanted`; its index tensors are new ones, or `fixed`.

        The tokens are one sequence's, following each other, or one each of several.
        `ExecutionError` when the phase cannot take them.
        """
        if not 0 < len(ids) <= self.max_tokens or len(wanted) > self.max_wanted:
            raise ExecutionError(
                f"phase {self.phase.name} takes 1..{self.max_tokens} tokens and gives up to"
                f" {self.max_wanted} rows of logits, not {len(ids)} and {len(wanted)}"
            )
        call = make_call(
            self.kv,
            self._needs,
            {name: memory.device.torch_device for name, memory in self._memory.items()},
            ids,
            positions,
            tables,
            wanted,
            ranks=self.phase.ranks,
            lanes=self.phase.lanes,
            fixed=fixed,
        )
        for each in self._planned.values():
            each.plan(call, fixed)
        return call

    def logits(self, call: Call) -> npt.NDArray[np.float32]:
        """f32 [rows wanted, vocab], once the call is done; a view that the next one overwrites."""
        return self._logits[: len(call.wanted)]

    @property
    def native(self) -> list[LoweredPhase]:
        """The CPU's native steps, each a program of its own."""
        return self._host.lowered

    def program(self, crossing: Crossing, flags: Flags) -> HostProgram:
        """The CPU's steps of a crossing as one native program."""
        return self._host.program(crossing, flags, self._shares)

    @property
    def pinnable(self) -> list[tuple[int, int]]:
        """Address and bytes of host memory that copies read and write."""
        spans = [self._host.span, (self._result.address, self._result.size)]
        return [(address, size) for address, size in spans if size]

    def close(self) -> None:
        """Give the host's part of the memory back."""
        self._logits = np.zeros((0, 0), np.float32)
        self._result.close()

    # -- what op functions ask ---------------------------------------------------------------------

    def share(self, step: Step) -> Share:
        """The rows the step works on."""
        return self._shares[step.id]

    def device(self, step: Step) -> str:
        """Where the step computes: "gpu<n>" or "host"."""
        return device_of(step.resource)

    def tensor(self, operand: Operand) -> torch.Tensor:
        """All rows of an operand's columns; a view."""
        buffer = self._buffers[operand.buffer]
        columns = slice(operand.column, operand.column + operand.width)
        if buffer.offset < 0:
            return self._external(buffer)[:, columns]
        if buffer.device == "host":
            return self._host.tensor(operand)
        size = DTYPE_BYTES[buffer.dtype] * buffer.width
        raw = self._memory[buffer.device].rows(self.phase, buffer.offset, size)
        return raw.view(TORCH_TYPES[buffer.dtype])[:, columns]

    def matrix(self, step: Step, role: str) -> Matrix:
        """A matrix of the step, resident or in its slot."""
        packed, raw = self._place(step, step.weights[role])
        return packed.matrix(step.weights[role], raw)

    def vector(self, step: Step, role: str) -> torch.Tensor | None:
        """A vector of the step; None where it has none of this role."""
        if role not in step.weights:
            return None
        packed, raw = self._place(step, step.weights[role])
        return packed.vector(step.weights[role], raw)

    def experts(self, step: Step) -> dict[int, Expert]:
        """The experts that the step computes."""
        if step.uses:
            packed, raw = self._slot(step, step.uses[0], self._holding[step.id][step.uses[0]])
        else:
            packed, raw = self._memory[self.device(step)].experts[step.layer]
        return packed.experts(raw)

    def workspace(self, step: Step) -> Workspace:
        """What split sums of the step's stream share."""
        return self._memory[self.device(step)].workspace(self.phase)

    def planned(self, key: Hashable, calls: PlannedT) -> PlannedT:
        """`calls`, or what was given before with the same key, told of each call."""
        found: PlannedT = self._planned.setdefault(key, calls)
        return found

    def adds(self, step: Step) -> bool:
        """Whether an experts step adds to what earlier ones left in y."""
        return step.id in self._adding

    def cache(self, layer: int, state: str) -> torch.Tensor:
        """A layer's state on the home GPU: [tokens, width], or [slots, width] of one a sequence."""
        return self._memory[HOME].caches[layer, state]

    def before(self, call: Call, layer: int, state: str) -> torch.Tensor:
        """Cache rows of the tokens before a call's, in order: bf16 [past, width]."""
        if HOME not in self._memory:
            return self._past[layer, state]
        return self.cache(layer, state)[call.past_slots]

    def share_past(self, call: Call, layer: int, state: str) -> None:
        """Give the other ranks what `before` needs, or take it from rank 0.

        One layer's rows are kept, and those that later ones read: of the next they come when its
        attention is due.
        """
        if self.link is None:
            raise ExecutionError(f"phase {self.phase.name} has no other ranks to tell of the past")
        if HOME in self._memory:
            self.link.broadcast(self.before(call, layer, state))
            return
        (memory,) = self._memory.values()
        shape = call.past, self.plan.kv.state(layer, state).width
        rows = torch.empty(shape, dtype=torch.bfloat16, device=memory.device.torch_device)
        read = {kept_by(step.attrs, layer) for step in self.phase.steps}
        for old in [key for key in self._past if key[0] not in read]:
            del self._past[old]
        self._past[layer, state] = self.link.broadcast(rows).to(rows.device)

    def place(self, operand: Operand) -> str:
        """The device an operand's buffer is on."""
        return self._buffers[operand.buffer].device

    def home(self, device: str) -> bool:
        """Whether the cache is on this device."""
        return device == HOME

    def copies(self, step: Step) -> list[tuple[int, torch.Tensor]]:
        """What a load moves: host address of each piece, and where it goes."""
        if not step.weights:
            memory = self._memory[self.device(step)]
            return memory.packed.copies(memory.weights)
        packed, raw = self._slot(step, step.fills[0], step.id)
        return packed.copies(raw)

    def copies_of_experts(self, step: Step) -> dict[int, list[tuple[int, torch.Tensor]]]:
        """What a load of experts moves, by expert."""
        packed, raw = self._slot(step, step.fills[0], step.id)
        return packed.copies_of_experts(raw)

    # -- inside ------------------------------------------------------------------------------------

    def _bound(self, step: Step) -> Work:
        if step.resource == "cpu" and is_native(step):
            return self._host.work(step, self.share(step))
        place = self.device(step)
        device = self._memory[place].device.torch_device if place in self._memory else _CPU
        work, share = device_op(step, device)(self, step), self.share(step)
        if OPS[step.op].always:
            return work
        return lambda call: work(call) if call.count(share) else None

    def _slot(self, step: Step, slot: str, load: int) -> tuple[Packed, torch.Tensor]:
        """What a load step has brought into a slot of the step's device, and its bytes there."""
        return self._memory[self.device(step)].slot(self.phase.name, load, slot)

    def _place(self, step: Step, name: str) -> tuple[Packed, torch.Tensor]:
        """The packed weights that hold `name` for the step, and their bytes."""
        for slot in step.uses:
            packed, raw = self._slot(step, slot, self._holding[step.id][slot])
            if name in packed:
                return packed, raw
        memory = self._memory[self.device(step)]
        return memory.packed, memory.weights

    def _external(self, buffer: Buffer) -> torch.Tensor:
        if buffer.name == _LOGITS:
            return view(self._result.address, torch.float32, (self.max_wanted, buffer.width))
        if buffer.device not in self._memory:
            raise ExecutionError(f"a device step reads {buffer.name}, which stays on the host")
        size = DTYPE_BYTES[buffer.dtype] * buffer.width * self.max_wanted
        raw = self._memory[buffer.device].result(self.phase, buffer.name, self.max_wanted)
        return raw[:size].view(TORCH_TYPES[buffer.dtype]).view(self.max_wanted, buffer.width)

    def _needed(self) -> Needs:
        shares, picked = set(), {}
        for step in self.phase.steps:
            device = device_of(step.resource)
            row = OPS[step.op]
            if "positions" in step.inputs or row.attends:
                shares.add((self._shares[step.id], device))
            elif row.picks:
                ranks = self.phase.ranks
                picked[device] = Share("rank", int(device[3:]), ranks) if ranks > 1 else ALL
        home = HOME if HOME in self._memory else min(self._memory)
        return Needs(home, frozenset(shares), picked)


def _part(phase: Phase, link: Link | None) -> Phase:
    """What of a phase runs in this process."""
    return phase if link is None or phase.ranks == 1 else part_of_rank(phase, link.rank)
