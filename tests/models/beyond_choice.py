"""What models whose attention is sparse have to do beyond what a token can choose, whoever chooses:
prompts in chunks, batches, known beginnings, devices and lanes. Each gives what float32 does.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import draw
from parity import errors
from safetensors.torch import save_file
from split_plans import DUAL, STREAM
from tiny_models import Floats, prompt

from hmc.checkpoint.config import load_config
from hmc.models import load, weight_specs
from hmc.plan import Plan
from hmc.runtime.executor import Executor

LENGTH = 150


def write_random(directory: Path, values: dict[str, Any]) -> None:
    """A checkpoint of a configuration, whose biases stay in F32."""
    (directory / "config.json").write_text(json.dumps(values))
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, spec in sorted(weight_specs(load(load_config(directory)).module).items()):
        shape = spec.view.shape if spec.view else spec.shape
        for each in [spec.name.format(e=e) for e in range(spec.experts)] or [spec.name]:
            drawn = draw(each, torch.empty(shape), False, generator)
            tensors[each] = drawn if name.endswith("bias") else drawn.to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def close(found: Floats, exact: Floats, bound: float = 0.06) -> None:
    """Of tokens that cannot choose all: attention to all positions errs by twice the `bound` and
    more. A near tie of an indexer may go another way for some of them.
    """
    wrong = errors(found, exact)
    assert len(wrong) > 8 and np.median(wrong) < bound, wrong


def in_chunks(found: Executor, ids: list[int], size: int) -> Floats:
    """Logits of all tokens of a prompt, `size` at a time."""
    sequence, rows = found.open(), []
    for first in range(0, len(ids), size):
        part = np.array(ids[first : first + size], np.int32)
        rows.append(found.append(sequence, part, np.arange(len(part), dtype=np.int32)).copy())
    found.release(sequence)
    return np.concatenate(rows)


def decode_continues(
    found: Executor, exact: Floats, lengths: tuple[int, ...], bound: float = 0.06
) -> None:
    """Of several sequences together, each at its own position."""
    ids = prompt(LENGTH)
    sequences = [found.open() for _ in lengths]
    for sequence, length in zip(sequences, lengths, strict=True):
        for _ in found.prefill(sequence, np.array(ids[:length], np.int32)):
            pass
    rows: list[list[Floats]] = [[] for _ in lengths]
    for step in range(12):
        tokens = np.array([ids[length + step] for length in lengths], np.int32)
        for mine, row in zip(rows, found.decode(sequences, tokens), strict=True):
            mine.append(row.copy())
    for sequence, length, mine in zip(sequences, lengths, rows, strict=True):
        found.release(sequence)
        close(np.stack(mine), exact[length : length + 12], bound)


def goes_on_from_known_blocks(found: Executor) -> None:
    """To the bit, from two pages that an earlier prompt left."""
    ids, rows = np.array(prompt(LENGTH), np.int32), []
    for known in (0, 128):
        sequence = found.open()
        assert found.kv.adopt(sequence, ids) == known
        *_, last = found.prefill(sequence, ids[sequence.length :])
        rows.append(last[-1].copy())
        found.kv.keep(sequence, ids)
        found.release(sequence)
    assert (rows[0] == rows[1]).all()


def on_devices_ranks_and_lanes(
    found: Executor, split: Plan, exact: Floats, past: int, bound: float = 0.06
) -> None:
    """Every phase of prompts, from the start and after `past` tokens; decode in two lanes."""
    ids = np.array(prompt(LENGTH), np.int32)
    names = [phase.name for phase in split.phases if phase.name.startswith("prefill")]
    assert STREAM in names and any(phase.ranks == 2 for phase in split.phases)
    for name in names:
        for before in (0, past):
            close(continued(found, ids, name, before), exact[139:], bound)
    pair = [found.open(), found.open()]
    for sequence in pair:
        for _ in found.prefill(sequence, ids[:120]):
            pass
    lanes = [found.decode(pair, ids[[at, at]])[1].copy() for at in range(120, 132)]
    close(np.stack(lanes), exact[120:132], bound)
    assert found.calls[DUAL] == 12


def continued(found: Executor, ids: np.ndarray, phase: str, past: int) -> Floats:
    """Logits of a prompt's last token by a phase, and of those that follow."""
    sequence = found.open()
    for _ in found.prefill(sequence, ids[:past]) if past else ():
        pass
    *_, last = found.prefill(sequence, ids[past:140], phase=phase)
    rows = [last[-1].copy()]
    rows += [found.decode([sequence], ids[n : n + 1])[0].copy() for n in range(140, LENGTH)]
    found.release(sequence)
    return np.stack(rows)
