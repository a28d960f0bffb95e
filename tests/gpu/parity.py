"""Section of the GPU check: the device's logits beside the CPU path's of the same process, for
small random checkpoints.

A row of logits is compared by the norm of its difference over its norm. Rounding alone leaves the
median below `_MEDIAN`; a row may be further away where rounding tips the choice of an expert, so at
most a quarter may be beyond `_FAR`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gpu.models import write_checkpoint
from gpu.plans import Model
from gpu.rows import Clock, Row
from gpu.sizes import Bench, token_ids
from hmc.errors import ExecutionError
from hmc.plan import Plan
from hmc.plan.phases import DECODE, DUAL, PREFILL, STREAM
from hmc.runtime.executor import Executor
from hmc.runtime.phases.choice import Devices

_MEDIAN, _FAR, _SHARE = 0.01, 0.03, 0.25
_PROMPT, _PROMPTS, _ROWS, _STEPS, _BATCH = 40, 4, 16, 16, 4
_CONTEXT, _CHUNK = 256, 64

Floats = npt.NDArray[np.float32]


def parity(bench: Bench, clock: Clock) -> Iterator[Row]:
    """For every model and format a row each of a streamed prompt, decoding on both, two lanes."""
    for seed, (name, quant) in enumerate(bench.sizes.parity):
        case = f"{name}, {quant}"
        clock.check(case)
        directory = write_checkpoint(bench.folder, name, quant, seed)
        model = Model(directory, bench.machine, _CONTEXT, _CHUNK, dummy=False)
        expected = _logits(model.host(), directory, {PREFILL: PREFILL, DECODE: DECODE}, "auto")
        plan = model.divided(STREAM, DUAL, DECODE)
        phases = {STREAM: PREFILL, DECODE: DECODE, DUAL: DECODE}
        found = _logits(plan, directory, phases, bench.devices)
        for phase, same in phases.items():
            yield _compared(case, phase, found[phase], expected[same])


def _logits(
    plan: Plan, directory: Path, phases: dict[str, str], devices: Devices
) -> dict[str, Floats]:
    """By phase: logits of prompts' last tokens, or of some decode steps with given tokens."""
    with closing(Executor(plan, directory, home="shared", devices=devices)) as executor:
        return {
            name: _decoded(executor, name) if kind == DECODE else _prompt(executor, name)
            for name, kind in phases.items()
        }


def _prompt(executor: Executor, phase: str) -> Floats:
    rows = np.arange(_PROMPT - _ROWS, _PROMPT, dtype=np.int32)
    found = []
    for seed in range(_PROMPTS):
        sequence = executor.open()
        ids = token_ids(_PROMPT, executor.plan.model.vocab, seed)
        found.append(executor.append(sequence, ids, rows, phase).copy())
        executor.release(sequence)
    return np.concatenate(found)


def _decoded(executor: Executor, phase: str) -> Floats:
    vocab = executor.plan.model.vocab
    sequences = [executor.open() for _ in range(_BATCH)]
    for seed, sequence in enumerate(sequences):
        for _ in executor.prefill(sequence, token_ids(_PROMPT - seed, vocab, seed), phase=PREFILL):
            pass
    given = token_ids(_STEPS * _BATCH, vocab, _BATCH).reshape(_STEPS, _BATCH)
    logits = [executor.decode(sequences, tokens, phase).copy() for tokens in given]
    for sequence in sequences:
        executor.release(sequence)
    return np.concatenate(logits)


def _compared(case: str, phase: str, found: Floats, expected: Floats) -> Row:
    if not np.isfinite(found).all():
        raise ExecutionError(f"{case}: {phase} gave logits that are not finite")
    off = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    middle, far = float(np.median(off)), float(np.mean(off > _FAR))
    return Row(
        "parity",
        case,
        f"{phase}, median difference of logits",
        middle,
        against="bound",
        reference=_MEDIAN,
        verdict="ok" if middle <= _MEDIAN and far <= _SHARE else "FAILED",
        note=f"{far:.0%} of {len(off)} rows beyond {_FAR:g}",
    )
