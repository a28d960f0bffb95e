"""What a layer's steps hand to a GPU, counted: launches, and bytes that kernels read and write. All
tensors are on the meta device, of their true sizes; kernels are not run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hmc.codegen.triton import build, library
from hmc.ops.matmul import chosen_experts
from hmc.plan import Operand, Phase, Plan, Step
from hmc.plan.stored import forms_of
from hmc.predict.cost import Call as Load
from hmc.predict.cost import CostModel
from hmc.ranges import expert_ranges
from hmc.runtime.binding.walk import walked
from hmc.runtime.device_ops import DEVICE_OPS
from hmc.runtime.device_ops.gpu import attends, dense, routed
from hmc.runtime.device_ops.gpu.table import TRITON_OPS
from hmc.runtime.device_ops.matmul import Expert, Matrix
from hmc.runtime.device_ops.shares import Call, Rows, Span
from hmc.runtime.device_ops.triton import launch
from hmc.runtime.device_ops.triton.launch import Workspace
from hmc.runtime.weights.torch_view import TORCH

META = torch.device("meta")
_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "i32": torch.int32}
_VIEWS = ("view", "slice", "select", "expand", "permute", "detach", "unsqueeze", "split", "alias",
          "empty", "as_strided", "transpose", "t.", "_unsafe_view", "new_empty")  # fmt: skip


@dataclass
class Counted:
    """Launches by name, and bytes."""

    launches: dict[str, int] = field(default_factory=dict)
    bytes: float = 0.0

    def add(self, name: str, size: float) -> None:
        self.launches[name] = self.launches.get(name, 0) + 1
        self.bytes += size

    @property
    def total(self) -> int:
        return sum(self.launches.values())


class _Mode(TorchDispatchMode):
    """Counts operations of PyTorch that launch kernels."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self._counted = counted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        name = str(func).removeprefix("aten.")
        if not name.startswith(_VIEWS):
            moved = {id(each): each for each in _tensors((args, kwargs, found))}
            self._counted.add(name, sum(map(_size, moved.values())))
        return found


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _Kernels:
    """In place of compiled kernels: `[grid](...)` is counted, with the bytes of its tensors but the
    partial sums, which stay in caches. Several launches of a step that are given the same tensor
    work on parts of it each."""

    def __init__(self, counted: Counted, space: Workspace) -> None:
        self._counted, self._space = counted, space
        self.known: dict[int, torch.Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        def launched(*args: Any, **options: Any) -> None:
            mine = {id(each): each for each in _tensors(args)}
            mine.pop(id(self._space.partials), None)
            new = [each for key, each in mine.items() if key not in self.known]
            self.known.update(mine)
            self._counted.add(name, sum(map(_size, new)))

        return _Grid(launched)


class _Grid:
    def __init__(self, launched: Any) -> None:
        self._launched = launched

    def __getitem__(self, grid: Any) -> Any:
        assert all(0 < side < 1 << 31 for side in grid)
        return self._launched


class MetaBound:
    """A phase's memory that is nowhere. Implements `device_ops.Bound`."""

    link = None

    def __init__(self, plan: Plan, phase: Phase, tokens: int, context: int) -> None:
        self.plan, self.phase, self.sorted = plan, phase, {}
        self._tokens, self._context = tokens, context
        self._buffers = {buffer.name: buffer for buffer in phase.buffers}
        self._weights = {weight.name: weight for weight in plan.weights}
        self._shares, self._adding, _ = walked(phase)
        self.space = Workspace(META)

    def share(self, step: Step) -> Any:
        return self._shares[step.id]

    def device(self, step: Step) -> str:
        return step.resource

    def tensor(self, operand: Operand) -> torch.Tensor:
        buffer = self._buffers[operand.buffer]
        whole = torch.empty(self._tokens, buffer.width, dtype=_DTYPES[buffer.dtype], device=META)
        return whole[:, operand.column : operand.column + operand.width]

    def matrix(self, step: Step, role: str) -> Matrix:
        return self._matrix(self._weights[step.weights[role]])

    def vector(self, step: Step, role: str) -> torch.Tensor | None:
        return self.matrix(step, role).planes[0] if role in step.weights else None

    def experts(self, step: Step) -> dict[int, Any]:
        columns = [each for each in self.plan.experts if each.layer == step.layer]
        three = Expert(*map(self._matrix, columns))
        last = f"0-{self.plan.model.experts - 1}"
        return dict.fromkeys(expert_ranges(str(step.attrs.get("range", last))), three)

    def adds(self, step: Step) -> bool:
        return step.id in self._adding

    def cache(self, layer: int, state: str) -> torch.Tensor:
        width = self.plan.kv.state(layer, state).width
        return torch.empty(self._context + self._tokens, width, dtype=torch.bfloat16, device=META)

    def home(self, device: str) -> bool:
        return device == "gpu0"

    def workspace(self, step: Step) -> Workspace:
        return self.space

    def _matrix(self, weight: Any) -> Matrix:
        planes = tuple(
            torch.empty(form.shape, dtype=TORCH[form.kept], device=META)
            for form in forms_of(weight)
        )
        return Matrix(planes, weight.format, tuple(weight.shape)[-2:], weight.group)

    def call(self) -> Call:
        """One sequence's `tokens` behind a context."""
        tokens, past = self._tokens, self._context
        numbers = torch.empty(tokens, dtype=torch.int64, device=META)
        few = tokens <= 16
        reach = torch.empty(tokens, past + 1, dtype=torch.int64, device=META) if few else None
        rows = Rows(tokens, numbers, numbers, (Span(0, tokens, past),), reach, numbers)
        shares = {(self._shares[step.id], step.resource): rows for step in self.phase.steps}
        ids = np.zeros(tokens, np.int32)
        return Call(ids, ids, ids, ids[:1], not few, past, ids, numbers, shares,
                    torch.empty(past, dtype=torch.int64, device=META), {})  # fmt: skip


@contextmanager
def _counting(counted: Counted, space: Workspace, eights: bool) -> Iterator[_Kernels]:
    with pytest.MonkeyPatch.context() as patch:
        fake = _Kernels(counted, space)
        for module, name in ((build, "kernels"), (library, "kernels"), (library, "latent_kernels")):
            patch.setattr(module, name, lambda *args, **options: fake)
        for module in (dense, routed, attends):
            patch.setattr(module, "in_eights", lambda w, device: eights and w.layout.kind == "e4m3")
        patch.setattr(launch, "arch", lambda device: 120)
        patch.setattr(launch, "processors", lambda device: 170)
        yield fake


def layer(plan: Plan, name: str, number: int, tokens: int, context: int) -> tuple[Any, Any]:
    """(counted, predicted) of what the first GPU does for a layer of a phase in one call."""
    phase = plan.phase(name)
    bound, model = MetaBound(plan, phase, tokens, context), CostModel(plan)
    load = Load(tokens, context, 1 if tokens > 16 else tokens)
    eights = plan.machine.gpus[0].rates.fp8 is not None
    counted, launches, moved = Counted(), 0, 0.0
    call = bound.call()
    with _counting(counted, bound.space, eights) as fake:
        for step in phase.steps:
            if step.layer != number or step.resource != "gpu0":
                continue
            make = TRITON_OPS.get(step.op) or DEVICE_OPS[step.op]
            work = make(bound, step)
            fake.known.clear()
            with _Mode(counted):
                work(call)
            if step.op == "experts":  # their addresses are in a table
                distinct = chosen_experts(step.attrs, tokens)
                counted.bytes += step.weight_bytes * distinct / int(step.attrs["top_k"])
            cost = model.step(phase, step, load)
            launches, moved = launches + cost.launches, moved + cost.bytes["gpu"]
    return counted, SimpleNamespace(launches=launches, bytes=moved)
