"""The CPU's steps of a schedule: native kernels on host buffers; hides that each step is a program
of its own, lowered like a phase of a CPU plan.
"""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np
import torch

from hmc.codegen.jit import Jit
from hmc.plan import Buffer, Operand, Phase, Plan, Step
from hmc.runtime.arena import Arena
from hmc.runtime.device_ops.base import Work
from hmc.runtime.kv import KVCache
from hmc.runtime.lowering import LoweredPhase, Lowering
from hmc.runtime.ops import OPS
from hmc.runtime.pool import Pool
from hmc.runtime.shares import Call, Share
from hmc.runtime.tables import Tables
from hmc.runtime.weights import WeightStore
from hmc.verify import EXTERNAL, expert_ranges

_HERE = "here"
"""Ids of the experts a step has, -1 in place of others."""
_NONE = np.zeros(0, np.int32)


class HostSteps:
    """The host's activation buffers of one phase, and the work of its native steps."""

    def __init__(
        self,
        plan: Plan,
        phase: Phase,
        store: WeightStore,
        kv: KVCache,
        tables: Tables,
        jit: Jit,
        pool: Pool,
    ) -> None:
        self._plan, self._store, self._kv, self._tables = plan, store, kv, tables
        self._jit, self._pool = jit, pool
        names = {"ids", "positions", "rows"}
        buffers = [each for each in phase.buffers if each.offset >= 0 and each.device == "host"]
        buffers += [
            Buffer(name=name, dtype="i32", width=1, offset=EXTERNAL) for name in sorted(names)
        ]
        buffers += [
            Buffer(name=_HERE, dtype="i32", width=plan.model.top_k, offset=EXTERNAL),
            Buffer(name="logits", dtype="f32", width=1, offset=EXTERNAL),  # of no native step here
        ]
        native = tuple(
            _plain(step) for step in phase.steps if step.resource == "cpu" and is_native(step)
        )
        self._phase = phase.model_copy(update={"buffers": tuple(buffers), "steps": native})
        self.lowered: list[LoweredPhase] = []
        self._stack = ExitStack()
        self.arena = Arena(self._phase)
        self._stack.callback(self.arena.close)

    def work(self, step: Step, share: Share) -> Work:
        """What a native step does in a call."""
        one = self._phase.model_copy(update={"steps": (_plain(step),)})
        lowering = Lowering(
            self._plan, one, self._store, self._kv, self._tables, self._jit, self._pool.workers
        )
        lowering.arena.close()
        lowering.arena = self.arena
        lowered = LoweredPhase(lowering, OPS, self._pool)
        self.lowered.append(lowered)
        mask = self._mask(step)

        def work(call: Call) -> None:
            if not (count := call.count(share)):
                return
            at = np.concatenate([np.arange(*piece) for piece in share.pieces(call.tokens)])
            if mask is not None:
                chosen = self.arena.tensor(step.inputs["ids"], count).numpy()
                here = self.arena.inputs(_HERE)[: chosen.size].reshape(chosen.shape)
                np.copyto(here, np.where(mask[chosen], chosen, -1))
            lowered.run(call.ids[at], call.positions[at], call.tables[at], _NONE)

        return work

    def tensor(self, operand: Operand) -> torch.Tensor:
        """All rows of a host buffer's columns."""
        return self.arena.tensor(operand, self.arena.max_tokens)

    @property
    def span(self) -> tuple[int, int]:
        """Address and bytes of the buffers that copies read and write."""
        inside = [each for each in self._phase.buffers if each.offset == 0]
        if not inside:
            return 0, 0
        first = Operand(buffer=inside[0].name, width=inside[0].width)
        return self.arena.address(first), self._phase.activation_bytes * self.arena.max_tokens

    def close(self) -> None:
        """Give the memory back."""
        self._stack.close()

    def _mask(self, step: Step) -> np.ndarray[tuple[int], np.dtype[np.bool_]] | None:
        """Which experts the step has; None: all."""
        if "range" not in step.attrs:
            return None
        mask = np.zeros(int(step.attrs["experts"]), np.bool_)
        mask[expert_ranges(str(step.attrs["range"]))] = True
        return mask


def is_native(step: Step) -> bool:
    """Whether a step on "cpu" is the native kernels' (rows of lanes are moved by PyTorch)."""
    return not any(key.startswith("torch:") for key in step.kernels)


def _plain(step: Step) -> Step:
    """The step with inputs under the names a CPU phase has."""
    inputs = dict(step.inputs)
    for role, operand in inputs.items():
        if step.op == "embed" and role == "ids":
            inputs[role] = Operand(buffer="ids", width=1)
        elif role == "ids" and "range" in step.attrs:
            inputs[role] = Operand(buffer=_HERE, width=operand.width)
    return step.model_copy(update={"inputs": inputs})
