"""Kernels of GPUs made ready before the first call: what phases launch for 1, 2, 3, 4, 5, 8, 9 ...
tokens, and for the most they take, is compiled and loaded.

Between these numbers nothing changes that kernels are compiled for: tiles are for up to so many
tokens, and sums split where tiles are few. Steps that are alike but for their layer are looked at
once. The calls are of tokens at the beginning of sequences; they write no cache, and what they
leave in buffers is of no use to anybody.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch

from hmc.codegen.triton.compiling import Progress, make_ready
from hmc.plan import Plan, Step
from hmc.plan.memory import kind_of
from hmc.plan.phases import BESIDE
from hmc.plan.stored import forms_of
from hmc.runtime.binding.phase import BoundPhase
from hmc.runtime.device_ops.base import Work
from hmc.runtime.device_ops.gpu.table import TRITON_OPS, computes
from hmc.runtime.device_ops.shares import Call
from hmc.runtime.devices.base import Backend
from hmc.runtime.devices.gpu import Gpu

Made = tuple[Step, Work]


def warm(phases: Iterable[BoundPhase], backend: Backend, progress: Progress | None = None) -> None:
    """Make ready what steps of `phases` launch; nothing for GPUs that the CPU plays. Raises
    `KernelError` with what Triton says, and `CapacityError` where a call finds no memory."""
    for gpu in backend.devices:
        place = gpu.torch_device
        if computes(place):
            steps = [(bound, _different(bound, gpu)) for bound in phases]
            with torch.cuda.device(place) if place.type == "cuda" else nullcontext():
                make_ready(partial(_launch, steps, backend), progress)


def _launch(steps: Iterable[tuple[BoundPhase, list[Made]]], backend: Backend) -> None:
    """Each step for all numbers of tokens, where it is in a call."""
    for bound, some in steps:
        least = max(bound.phase.lanes, _pieces(bound))
        most = min(bound.max_tokens, bound.plan.limits.max_context)
        for tokens in numbers_between(least, most) if some else ():
            call = _call(bound, tokens)
            for step, work in some:
                stream = backend.stream(step.resource, aside=bound.phase.name == BESIDE)
                stream.launch(partial(work, call), f"{step.op}, tried before the first call")
    backend.synchronize()


def _different(bound: BoundPhase, gpu: Gpu) -> list[Made]:
    """The steps of a GPU that launch kernels, the first of those that are alike."""
    stored, found = _stored(bound.plan), dict[Hashable, Made]()
    for step, work in zip(bound.phase.steps, bound.works, strict=True):
        if step.resource == gpu.name and step.op in TRITON_OPS:
            attrs = tuple(sorted(item for item in step.attrs.items() if item[0] != "range"))
            operands = (*step.inputs.items(), *step.outputs.items())
            weights = tuple((role, *stored[name]) for role, name in step.weights.items())
            like = step.op, attrs, operands, weights, bound.adds(step), bound.share(step)
            found.setdefault(like, (step, work))
    return list(found.values())


def _stored(plan: Plan) -> dict[str, list[Hashable]]:
    """How what steps call weights lies in memory."""
    found = defaultdict[str, list[Hashable]](list)
    for weight in plan.weights:
        found[weight.name] += (weight.format, weight.group, forms_of(weight))
    for experts in plan.experts:
        found[f"layer:{experts.layer}"] += (experts.format, experts.group, forms_of(experts))
    return found


def numbers_between(least: int, most: int) -> Iterator[int]:
    """Tokens of calls of `least` to `most` that launch whatever any such call does."""
    powers = {1 << bit for bit in range(most.bit_length())}
    every = sorted({*powers, *(power + 1 for power in powers), most}, reverse=True)
    return (tokens for tokens in every if least <= tokens <= most)


def _call(bound: BoundPhase, tokens: int) -> Call:
    """One token each of several sequences where phases decode, else those of one; with logits of as
    many as there are."""
    numbers, zeros = np.arange(tokens, dtype=np.int32), np.zeros(tokens, np.int32)
    decodes = kind_of(bound.phase) == "decode"
    wanted = min(bound.max_wanted, -(-tokens // _pieces(bound)))
    positions, tables = (zeros, numbers) if decodes else (numbers, zeros)
    return bound.call(zeros, positions, tables, numbers[tokens - wanted :])


def _pieces(bound: BoundPhase) -> int:
    """Into how many runs of tokens GPUs divide a call."""
    return 2 * bound.phase.ranks if bound.phase.ranks > 1 else 1
