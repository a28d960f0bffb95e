"""What native kernels read and write of a plan, in symbols: every record of every phase with the
arguments that are addresses, sizes, strides and counts, and its kernel.

The op functions of the runtime themselves (runtime/host/ops.py) run on a recorder. An activation
is named after who wrote its bytes last, not after where they are: a buffer at another free place is
the same buffer. Memory that the runtime sizes by the very number it then holds calls to (rows by
`max_tokens`, tables and scratch by `max_context`, the cache by its capacity) is as large as ever.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.codegen.arguments import ARGS
from hmc.codegen.spec import KernelSpec
from hmc.plan import DTYPE_BYTES, Operand, Phase, Plan, Step
from hmc.plan.model import EXTERNAL
from hmc.runtime.binding.walk import walked
from hmc.runtime.host.ops import host_op
from hmc.runtime.schedule.crossing import is_native
from hmc.runtime.weights.tensors import tensor_groups

_TOKENS, _CONTEXT, _WORKERS = 16, 256, 2
_ARRAY = np.zeros(2, np.int32)
_NUMBERS: dict[Hashable, int] = {}


def _number(symbol: Hashable) -> int:
    """One number for one symbol, in all plans."""
    return _NUMBERS.setdefault(symbol, len(_NUMBERS) + 1)


class _Store:
    """Addresses of weights: shard and offset."""

    def __init__(self, plan: Plan) -> None:
        self._formats = {weight.name: weight.format for weight in plan.weights}
        self._places = {
            group.key: (group.shards << 40) + group.offsets for group in tensor_groups(plan)
        }

    def address(self, name: str) -> int:
        return int(self._places[("weight", name, "codes")][0])

    def scale_address(self, name: str) -> int:
        found = self._places.get(("weight", name, "scale"))
        return 0 if found is None else int(found[0])

    def expert_vectors(self, layer: int, role: str) -> tuple[int, ...]:
        """Where a vector of each of a layer's experts is stored; () where there are none."""
        return tuple(map(int, self._places.get(("expert", layer, role, "codes"), ())))

    def expert_table(self, layer: int) -> npt.NDArray[np.int64]:
        columns = [
            self._places.get(("expert", layer, role, plane))
            for role in ("gate", "up", "down")
            for plane in ("codes", "scale")
        ]
        count = len(next(each for each in columns if each is not None))
        return np.stack([np.zeros(count, np.int64) if c is None else c for c in columns], 1)


class _Memory:
    """Who wrote which bytes of a device's arena last: (first, last, writer, its first byte)."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, int, Hashable, int]] = []

    def written(self, first: int, last: int) -> Hashable:
        return tuple(
            (who, max(a, first) - start, min(b, last) - start)
            for a, b, who, start in self._parts
            if a < last and first < b
        )

    def write(self, first: int, last: int, who: Hashable) -> None:
        kept = []
        for a, b, other, start in self._parts:
            if a < first:
                kept.append((a, min(b, first), other, start))
            if b > last:
                kept.append((max(a, last), b, other, start))
        self._parts = sorted([*kept, (first, last, who, first)], key=lambda part: part[0])


class _Recorder:
    """Stands for `Lowering`, its arena, cache and tables."""

    def __init__(self, plan: Plan, phase: Phase, store: _Store) -> None:
        self.phase, self.workers, self.routing = phase, _WORKERS, None
        self.plan = SimpleNamespace(limits=SimpleNamespace(max_context=_CONTEXT))
        self.store, self._kernels, self._constants = store, plan.kernels, plan.constants
        self.arena = self.kv = self.tables = self
        self.max_tokens = _TOKENS
        self.order = self.span = self.sequence = _ARRAY
        self.team_table = 0
        self.records: list[tuple[Any, ...]] = []
        self._buffers = {buffer.name: buffer for buffer in phase.buffers}
        self._memory: dict[str, _Memory] = {}
        self._now: dict[tuple[str, int, int], int] = {}
        self._formats = {weight.name: weight.format for weight in plan.weights}

    def step(self, step: Step, native: bool) -> None:
        """Name the step's operands, and record it where kernels compute it."""
        self._now = {}
        for operand in step.inputs.values():
            self._now[_key(operand)] = _number(self._read(operand))
        for role, operand in step.outputs.items():
            self._now.setdefault(_key(operand), _number(("written", step.id, role)))
        if native:
            host_op(step.op)(self, step)  # type: ignore[arg-type]
        for role, operand in step.outputs.items():
            device, first, last = self._span(operand)
            if first >= 0:
                self._memory.setdefault(device, _Memory()).write(first, last, (step.id, role))

    def _span(self, operand: Operand) -> tuple[str, int, int]:
        buffer = self._buffers[operand.buffer]
        size = DTYPE_BYTES[buffer.dtype]
        if buffer.offset == EXTERNAL:
            return buffer.device, -1, -1
        first = buffer.offset + operand.column * size
        last = first + operand.width * size
        if buffer.device == "host":
            assert 0 <= first < last <= self.phase.activation_bytes, operand
        return buffer.device, first, last

    def _read(self, operand: Operand) -> Hashable:
        device, first, last = self._span(operand)
        if first < 0:
            return "external", operand.buffer
        return self._memory.setdefault(device, _Memory()).written(first, last)

    # -- what op functions ask ---------------------------------------------------------------------

    def specs(self, step: Step) -> dict[str, KernelSpec]:
        found = [self._kernels[key] for key in step.kernels]
        return {spec.op: spec for spec in found}

    def add(
        self,
        step: Step,
        spec: KernelSpec,
        *,
        reads: Iterable[Any],
        writes: Iterable[Any],
        shared: tuple[int, int] = (0, 0),
        **args: int | float,
    ) -> None:
        kinds = {arg.name: arg.kind for arg in ARGS[spec.op]}
        plain = tuple(sorted((k, int(v)) for k, v in args.items() if kinds[k] != "f32"))
        fields = spec.op, spec.isa, spec.weight, spec.out, spec.params
        self.records.append((step.id, fields, shared[1], plain))

    def rows_begin(self) -> None:
        self.records.append(("rows",))

    def address(self, operand: Any, part: str = "") -> int:
        if isinstance(operand, int):  # of the cache, a layer's tensor
            return _number(("cache", operand, part))
        return self._now[_key(operand)]

    def stride(self, operand: Operand) -> int:
        return self._buffers[operand.buffer].width

    def packed(self, operand: Operand) -> bool:
        return operand.width == self.stride(operand)

    def workspace(self, name: str, size: int) -> int:
        return _number(("workspace", name, size))

    def rotary(self, constant: str, factor: float, alpha: str | None = None) -> tuple[int, int]:
        about = len(self._constants[constant]), alpha
        return _number(("cos", *about)), _number(("sin", *about))

    def vector(self, name: str | None) -> int:
        return 0 if name is None else self.store.address(name)

    def expert_vectors(self, layer: int, role: str) -> int:
        found = self.store.expert_vectors(layer, role)
        return _number(("vectors", found)) if found else 0

    def array(self, key: Hashable, values: npt.NDArray[Any]) -> int:
        return _number(("array", values.shape, values.tobytes()))

    def table(self, layer: int) -> Any:
        return self

    @property
    def ctypes(self) -> Any:
        """Of a page table, which this is too."""
        return SimpleNamespace(data=_number("block tables"))

    @property
    def shape(self) -> tuple[int, int]:
        return 1, _CONTEXT


def _key(operand: Operand) -> tuple[str, int, int]:
    return operand.buffer, operand.column, operand.width


def footprint(plan: Plan) -> list[Any]:
    """What kernels read and write of every phase, by its position."""
    store, found = _Store(plan), []
    for phase in plan.phases:
        shares, _, _ = walked(phase)
        recorder = _Recorder(plan, phase, store)
        for step in phase.steps:
            native = step.resource == "cpu" and is_native(step)
            recorder.step(step, native)
            if native:
                recorder.records.append(("share", step.id, shares[step.id]))
        found.append(recorder.records)
    return found
