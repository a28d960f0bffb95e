"""A plan in memory, ready to compute logits: weights, cache, pool and lowered phases under one
roof.

`Executor` knows sequences and tokens, nothing of text or sampling. The engine drives one sequence
at a time; a scheduler may keep several open and decode them together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import numpy.typing as npt

from hmc.codegen.build import build
from hmc.codegen.isa import TIERS, require
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.errors import (
    CapacityError,
    ContextLengthError,
    ExecutionError,
    MachineError,
    UsageError,
)
from hmc.machine.detect import available_bytes, memory_limit
from hmc.plan import Plan
from hmc.plan.phases import (
    BESIDE,
    PREFILL,
    chunk_tokens,
    decode_calls,
    decode_phase,
    prefill_phase,
)
from hmc.runtime.host.lowering import LoweredPhase, Lowering, Parts, screened
from hmc.runtime.host.nan_scan import check_numbers
from hmc.runtime.host.ops import host_op
from hmc.runtime.host.pool import Pool
from hmc.runtime.host.trace import Recorder
from hmc.runtime.memory.kv import KVCache, Sequence
from hmc.runtime.phases.beside import DevicePrefill
from hmc.runtime.phases.choice import Devices, check_gpus, device_half, on_devices
from hmc.runtime.routing import RoutingRecorder
from hmc.runtime.weights.fill import Progress
from hmc.runtime.weights.placing import differing
from hmc.runtime.weights.store import Home, WeightStore

if TYPE_CHECKING:
    from hmc.runtime.devices.base import Backend
    from hmc.runtime.phases.phase import DevicePhase, DevicePhases

Logits = npt.NDArray[np.float32]


class ExecutorOptions(TypedDict, total=False):
    """Arguments of `Executor` that who opens one for somebody else hands on."""

    threads: int | None
    dummy_weights: bool
    home: Home
    progress: Progress | None
    routing: RoutingRecorder | None
    devices: Devices | Backend
    kv: KVCache | None
    cpus: Items[int] | None
    gpus: int | None


class Executor:
    """Owns everything a plan needs to run; `close` gives all of it back. Not safe for use from
    several threads; prompts given to `beside` are computed meanwhile.
    """

    def __init__(
        self,
        plan: Plan,
        directory: Path | None,
        *,
        threads: int | None = None,
        dummy_weights: bool = False,
        home: Home = "mapped",
        progress: Progress | None = None,
        routing: RoutingRecorder | None = None,
        store: WeightStore | None = None,
        kv: KVCache | None = None,
        cpus: Items[int] | None = None,
        only: str | None = None,
        devices: Devices | Backend = "auto",
        gpus: int | None = None,
    ) -> None:
        """With `routing`, every expert chosen is counted there (and programs end at every router).
        A `store` and a `kv` given from outside (shared with other processes) are used as they are
        and stay the caller's; memory is checked without a `store` only. `cpus` are the workers'
        places, instead of `threads`. `only` names the one phase to make ready.
        `devices` run what a plan has for GPUs (see `choice.Devices`; those given from outside are
        closed with the rest).
        With `gpus`, which is how many the plan shares prompts between, each has a process for that
        (runtime/ranks/group.py); without, this one drives all.

        Raises `MachineError` (ISA, GPUs), `CapacityError` (memory), and what `WeightStore.open`,
        `check_numbers` and `RankGroup` raise.
        """
        phases = [phase for phase in plan.phases if only in (None, phase.name)]
        self.plan = plan
        _require(plan)
        if gpus is not None:
            own = home == "arena" or (dummy_weights and home != "shared")
            check_gpus(plan, gpus, private=store is None and own)
        wanting = [phase for phase in phases if on_devices(phase)]
        played = bool(wanting) and device_half().plays_gpus(devices)
        if store is None:
            check_memory(plan, dummy_weights or home != "mapped", gpus_too=played)
        with ExitStack() as stack:
            used = {key for phase in phases for step in phase.steps for key in step.kernels}
            build((spec for key, spec in plan.kernels.items() if key in used), progress)
            jit = Jit(EMITTERS)
            self.pool = Pool(jit, TIERS[plan.isa], threads or plan.workers, cpus=cpus)
            self._memory = ExitStack()
            stack.callback(self._give_back)
            stack.enter_context(self.pool)
            self.pool.uses(self)
            self.store = store or WeightStore.open(
                plan,
                directory,
                dummy=dummy_weights,
                home=home,
                progress=progress,
                teams=self.pool.teams,
            )
            if store is None:
                self._memory.callback(self.store.close)
                if self.store.home != "dummy":
                    check_numbers(self.store, self.pool, jit, plan.isa, progress)
            self.kv = kv or KVCache(plan.kv, plan.limits.max_context)
            if kv is None:
                self._memory.callback(self.kv.close)
            homes = {team.memory for team in self.pool.teams}
            told = self.store.told, self.kv.spread(homes), differing(plan, self.pool.teams)
            self.placed = "; ".join(filter(None, told))
            """Where weights and cache lie on machines of several NUMA nodes, in words."""
            self._parts = Parts(plan, self.store, self.kv, jit, self.pool)
            self.phases: dict[str, LoweredPhase | DevicePhase] = {}
            self.pinned = ""
            """What of the weights is pinned for GPUs, in words; empty where nothing is."""
            self.beside: DevicePrefill | None = None
            """Computes prompts while others decode; None where the plan has no phase for that."""
            self._opened: DevicePhases | None = None
            if wanting:
                opened: DevicePhases = device_half().DevicePhases(
                    self._parts,
                    wanting,
                    devices,
                    routing=routing,
                    gpus=gpus,
                    directory=directory,
                    progress=progress,
                )
                self.pinned, self._opened = opened.pinned, opened
                stack.enter_context(opened)
                self.phases.update(opened.phases)
                if BESIDE in opened.phases:
                    self.beside = DevicePrefill(
                        self._run,
                        partial(chunk_tokens, plan, BESIDE, decoding=0),
                        opened.give_up,
                    )
                    stack.callback(self.beside.close)
            for phase in phases:
                if on_devices(phase):
                    continue
                lowering = Lowering(self._parts, phase, routing)
                self._memory.callback(lowering.arena.close)
                self.phases[phase.name] = LoweredPhase(lowering, host_op, self.pool)
            self._stack = stack.pop_all()
        self._open = True
        self.calls: Counter[str] = Counter()

    @property
    def handover(self) -> str:
        """How CPU and GPUs wait for each other in decode and what GPUs are handed, in words; empty
        without GPUs. What a device refuses later changes it."""
        return "" if self._opened is None else self._opened.handover

    @property
    def kernels_used(self) -> tuple[str, ...]:
        """Symbols of the native kernels (their names hold the ISA) and PyTorch functions that have
        really run.
        """
        ran = {kernel for phase in self.phases.values() if phase.ran for kernel in phase.kernels}
        return tuple(sorted(ran))

    @property
    def screened(self) -> Counter[str]:
        """What screened LM heads were asked and computed so far: see lowering.py."""
        return screened(self.phases.values())

    def open(self) -> Sequence:
        """A new sequence; `CapacityError` when `max_batch` are open."""
        self._check()
        return self.kv.open()

    def release(self, sequence: Sequence) -> None:
        """Free the sequence's place in the cache."""
        self.kv.release(sequence)

    def prefill(
        self,
        sequence: Sequence,
        ids: npt.NDArray[np.int32],
        *,
        every: bool = False,
        phase: str = "",
    ) -> Iterator[Logits]:
        """Append the tokens `ids` (at least one) to a sequence, chunk by chunk, by the phase that
        hmc/plan/phases.py chooses or the one named.

        Yields after each chunk the f32 logits of its tokens ([n, vocab], a view until the next
        chunk) with `every`, else [0, vocab], and [1, vocab] after the last. Raises
        `ContextLengthError` before anything is computed.
        """
        self._check()
        self._check_context(sequence, len(ids))
        self.kv.reserve(sequence, len(ids))
        name = phase or prefill_phase(self.plan, len(ids), every=every)
        self._require(name)
        end = sequence.length + len(ids)
        while left := end - sequence.length:
            if sequence.stops and not phase:  # after the last stop little is left
                name = prefill_phase(self.plan, left, every=every)
            yield self.chunk(sequence, ids[-left:], name, every=every)

    def chunk(
        self,
        sequence: Sequence,
        ids: npt.NDArray[np.int32],
        phase: str,
        *,
        every: bool,
        decoding: int = 0,
    ) -> Logits:
        """Append the next chunk of `ids`, all that is left of a prompt, to a sequence, while
        `decoding` others wait for tokens; logits as `prefill` yields them."""
        past, stops = sequence.length, sequence.stops
        count = chunk_tokens(self.plan, phase, len(ids), decoding, past, stops)
        rows = np.arange(count, dtype=np.int32)
        if not every:
            rows = rows[-1:] if count == len(ids) else rows[:0]
        return self.append(sequence, ids[:count], rows, phase)

    def append(
        self,
        sequence: Sequence,
        ids: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
        phase: str = PREFILL,
    ) -> Logits:
        """Append one chunk of at most the phase's `max_tokens` tokens to a sequence: the f32 logits
        [len(rows), vocab] of those at index `rows`, a view until the next call.

        Raises `ContextLengthError` or `CapacityError` before anything is computed, and
        `ExecutionError` for one that streams while another is computed beside: they share memory.
        """
        self._check()
        if phase != PREFILL and self.beside is not None and self.beside.busy:
            raise ExecutionError("a prompt is under way on the devices: they take one at a time")
        self._check_context(sequence, len(ids))
        self.kv.reserve(sequence, len(ids))
        logits = self._run(ids, sequence.row, sequence.length, rows, phase)
        sequence.length += len(ids)
        return logits

    def decode(
        self,
        sequences: list[Sequence],
        tokens: npt.NDArray[np.int32],
        phase: str = "",
        best: Items[int] | None = None,
    ) -> Logits:
        """One more token for each of up to `max_batch` sequences: logits f32 [n, vocab], a view
        until the next call. By the phase that hmc/plan/phases.py chooses, or the one named; more
        sequences than a call of it takes go in several. Logits of a row but the `best` largest may
        be -inf (`LoweredPhase.run`). Sequences do not influence each other. Raises
        `ContextLengthError` or `CapacityError` before anything runs.
        """
        self._check()
        for sequence in sequences:
            self._check_context(sequence, 1)
            self.kv.reserve(sequence, 1)
        positions = np.array([sequence.length for sequence in sequences], np.int32)
        table = np.array([sequence.row for sequence in sequences], np.int32)
        few = np.array(best or [0] * len(tokens), np.int32)
        name = phase or decode_phase(self.plan, len(sequences))
        found = self._require(name)
        calls = decode_calls(found.max_tokens, len(sequences))
        parts = []
        for part in (slice(first, last) for first, last in calls):
            rows = np.arange(part.stop - part.start, dtype=np.int32)
            logits = found.run(tokens[part], positions[part], table[part], rows, few[part])
            parts.append(logits if len(calls) == 1 else logits.copy())
            self.calls[name] += 1
        for sequence in sequences:
            sequence.length += 1
        return parts[0] if len(calls) == 1 else np.concatenate(parts)

    @contextmanager
    def recorded(self) -> Iterator[Recorder]:
        """Stamp everything that runs in the `with` block."""
        self._check()
        recorder = Recorder(self.pool)
        for phase in self.phases.values():
            phase.recorder = recorder
        try:
            yield recorder
        finally:
            for phase in self.phases.values():
                phase.recorder = None

    def close(self) -> None:
        """Stop the workers and free weights, cache and buffers; a second call does nothing. When a
        worker hangs (see `Pool`) everything stays as it is until the process ends.
        """
        self._open = False
        if not self.pool.left_behind:
            self._stack.close()

    def _give_back(self) -> None:
        """Free the memory that workers touch, once they have ended."""
        if not self.pool.left_behind:
            self._memory.close()

    def _run(
        self,
        ids: npt.NDArray[np.int32],
        row: int,
        start: int,
        rows: npt.NDArray[np.int32],
        phase: str = BESIDE,
    ) -> Logits:
        """One call of a phase: tokens of the sequence in a cache row, from position `start` on."""
        positions = np.arange(start, start + len(ids), dtype=np.int32)
        table = np.full(len(ids), row, np.int32)
        logits = self._require(phase).run(ids, positions, table, rows)
        self.calls[phase] += 1
        return logits

    def _require(self, name: str) -> LoweredPhase | DevicePhase:
        """A phase by its name."""
        if name not in self.phases:
            raise UsageError(f"no phase {name} here: there are {', '.join(self.phases)}")
        return self.phases[name]

    def _check(self) -> None:
        if not self._open:
            raise ExecutionError("the engine is closed")

    def _check_context(self, sequence: Sequence, more: int) -> None:
        total, limit = sequence.length + more, self.plan.limits.max_context
        if total > limit:
            raise ContextLengthError(
                f"{total} tokens exceed the plan's context of {limit}: shorten the prompt or"
                " compile with a larger --max-context"
            )


def _require(plan: Plan) -> None:
    """The plan's kernel tier; `MachineError` names what this CPU lacks, and the plan's machine."""
    try:
        require(plan.isa)
    except MachineError as error:
        raise MachineError(
            f"{error}. The plan is for {plan.machine.name}: compile one with --machine auto"
        ) from error


def check_memory(plan: Plan, own_weights: bool, *, gpus_too: bool = False) -> None:
    """Raise `CapacityError` naming the largest allocation when the plan's host memory does not fit
    this machine.

    Mapped weights may be dropped and read again, so they count against all memory; the rest against
    what is free now. With `gpus_too` the memory of GPUs is taken here as well: they are played.
    """
    items = [item for item in plan.ledger if gpus_too or item.device == "host"]
    weights = [item for item in items if item.device == "host" and item.detail == "weights"]
    own = items if own_weights else [item for item in items if item not in weights]
    for needed, limit, word in ((own, available_bytes(), "free"), (items, memory_limit(), "there")):
        total = sum(item.bytes for item in needed)
        if total > limit:
            largest = max(needed, key=lambda item: item.bytes)
            raise CapacityError(
                f"the plan needs {total / 2**30:.1f} GiB of memory, {limit / 2**30:.1f} GiB are"
                f" {word}; the largest part is {largest.kind}: {largest.bytes / 2**30:.1f} GiB"
                f" ({largest.detail})"
            )
