"""A `Bound` of plain tensors, and calls, steps and stored weights to try op functions with."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from hmc.plan import Operand, Step
from hmc.runtime.device_ops.matmul import Matrix
from hmc.runtime.device_ops.shares import ALL, Call, Needs, Share, make_call
from hmc.runtime.memory.kv import KVCache

GPU = "gpu0"


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def call_of(kv: KVCache, lengths: list[tuple[int, int]], wanted: list[int], **options: int) -> Call:
    """A call of sequences (past, new tokens)."""
    positions, tables = [], []
    for past, new in lengths:
        sequence = kv.open()
        kv.reserve(sequence, past + new)
        positions += range(past, past + new)
        tables += [sequence.row] * new
    ranks = options.get("ranks", 1)
    shares = [Share("rank", r, ranks) for r in range(ranks)] if ranks > 1 else [ALL]
    needs = Needs(GPU, frozenset((share, GPU) for share in shares), {GPU: shares[0]})
    i32 = lambda values: np.array(values, np.int32)  # noqa: E731
    return make_call(
        kv,
        needs,
        {GPU: torch.device("cpu")},
        i32(positions),
        i32(positions),
        i32(tables),
        i32(wanted),
        **options,
    )


def stored(form: str, rows: int, columns: int) -> Matrix:
    """A random matrix of a stored format."""
    values = random(rows, columns, seed=3)
    if form == "fp8":
        scale = random(-(-rows // 128), -(-columns // 128), seed=4).abs() + 0.01
        return Matrix((values.to(torch.float8_e4m3fn), scale), "fp8", (rows, columns))
    if form == "int4":
        of = torch.Generator().manual_seed(5)
        words = torch.randint(
            -(2**31), 2**31 - 1, (rows, columns // 8), dtype=torch.int32, generator=of
        )
        scale = (random(rows, columns // 32, seed=4).abs() + 0.01).to(torch.bfloat16)
        return Matrix((words, scale), "int4", (rows, columns), 32)
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16, "f32": torch.float32}[form]
    return Matrix((values.to(kind),), form, (rows, columns))


@dataclass
class Buffers:
    """A `Bound` of plain tensors."""

    values: dict[str, torch.Tensor]
    weights: dict[str, Any] = field(default_factory=dict)
    constants: dict[str, tuple[float, ...]] = field(default_factory=dict)
    caches: list[torch.Tensor] = field(default_factory=list)
    part: Share = ALL
    adding: bool = False
    sorted: dict[str, Any] = field(default_factory=dict)
    phase: Any = None
    kv: Any = None
    link: Any = None

    @property
    def plan(self) -> Any:
        return SimpleNamespace(
            constants=self.constants,
            model=SimpleNamespace(experts=8),
        )

    def place(self, operand: Operand) -> str:
        return operand.buffer

    def share(self, step: Step) -> Share:
        return self.part

    def device(self, step: Step) -> str:
        return GPU

    def home(self, device: str) -> bool:
        return True

    def tensor(self, operand: Operand) -> torch.Tensor:
        return self.values[operand.buffer][:, operand.column : operand.column + operand.width]

    def matrix(self, step: Step, role: str) -> Any:
        return self.weights[role]

    def vector(self, step: Step, role: str) -> Any:
        return self.weights.get(role)

    def experts(self, step: Step) -> Any:
        return self.weights["experts"]

    def adds(self, step: Step) -> bool:
        return self.adding

    def cache(self, layer: int, state: str) -> torch.Tensor:
        return self.caches[state == "v"]

    def before(self, call: Call, layer: int, state: str) -> torch.Tensor:
        return self.cache(layer, state)[call.past_slots]


def step_of(op: str, buffers: Buffers, outputs: str, **attrs: int | float | str) -> Step:
    """A step over all columns of every buffer."""
    operands = {
        name: Operand(buffer=name, width=value.shape[1]) for name, value in buffers.values.items()
    }
    out = outputs.split()
    return Step(
        id=0,
        op=op,
        layer=0,
        resource=GPU,
        inputs={name: part for name, part in operands.items() if name not in out or name == "x"},
        outputs={name: operands[name] for name in out},
        attrs=attrs,
    )
