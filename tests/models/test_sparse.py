"""Models whose attention is sparse: the choice of an indexer in chunks, in batches, after a prompt
that was known, over several devices and ranks, beyond what they can choose.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import draw
from parity import errors
from played import executor
from rank_bench import bench
from reference import load_model, run
from safetensors.torch import save_file
from split_plans import DUAL, STREAM, split_plan
from tiny_models import FOLDER, Floats, prompt

import hmc
from hmc.checkpoint.config import load_config
from hmc.errors import UsageError
from hmc.models import load, weight_specs
from hmc.plan import Plan
from hmc.plan.memory import kind_of
from hmc.predict.cost import Call, CostModel
from hmc.runtime.executor import Executor

LENGTH = 150


def write(directory: Path) -> None:
    """GLM-5, whose layer 2 shares the choice of layer 1, with few experts, all of which are taken:
    no near tie of a router goes another way.
    """
    values = json.loads((FOLDER / "glm_moe_dsa.json").read_text())
    values |= {"n_routed_experts": 4, "num_experts_per_tok": 4, "index_topk": 96}
    (directory / "config.json").write_text(json.dumps(values))
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, spec in sorted(weight_specs(load(load_config(directory)).module).items()):
        for each in [name.format(e=e) for e in range(spec.experts)] or [name]:
            drawn = draw(each, torch.empty(spec.shape), False, generator)
            tensors[each] = drawn if name.endswith("bias") else drawn.to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def directory(written: Callable[..., Path]) -> Path:
    return written("sparse", write)


@pytest.fixture(scope="module")
def exact(directory: Path) -> Floats:
    """Logits of the prompt in float32."""
    return run(load_model(directory).module, prompt(LENGTH)).numpy()


@pytest.fixture(scope="module")
def engine(directory: Path) -> Iterator[hmc.Engine]:
    plan = hmc.compile(directory, max_context=256, max_chunk=64, threads=2)
    with hmc.Engine(plan, threads=2) as found:
        yield found


def close(found: Floats, exact: Floats) -> None:
    """Of tokens that cannot choose all: attention to all positions errs by 0.2 and more. A near tie
    of an indexer may go another way for some of them.
    """
    wrong = errors(found, exact)
    assert len(wrong) > 8 and np.median(wrong) < 0.06, wrong


def in_chunks(found: Executor, ids: list[int], size: int) -> Floats:
    """Logits of all tokens of a prompt, `size` at a time."""
    sequence, rows = found.open(), []
    for first in range(0, len(ids), size):
        part = np.array(ids[first : first + size], np.int32)
        rows.append(found.append(sequence, part, np.arange(len(part), dtype=np.int32)).copy())
    found.release(sequence)
    return np.concatenate(rows)


@pytest.mark.slow
def test_chunks_give_the_same_bits(engine: hmc.Engine, exact: Floats) -> None:
    ids = prompt(LENGTH)
    whole = in_chunks(engine.executor, ids, 64)
    close(whole[110:], exact[110:])
    assert errors(whole, exact)[:96].max() < 0.02  # all are chosen
    for size in (7, 33):
        assert (in_chunks(engine.executor, ids, size) == whole).all()


@pytest.mark.slow
def test_decode_continues(engine: hmc.Engine, exact: Floats) -> None:
    """Of several sequences together, each at its own position."""
    ids, found = prompt(LENGTH), engine.executor
    sequences = [found.open() for _ in range(3)]
    lengths = (5, 93, 130)
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
        close(np.stack(mine), exact[length : length + 12])


@pytest.mark.slow
def test_a_prompt_goes_on_from_known_blocks(engine: hmc.Engine) -> None:
    found, ids = engine.executor, np.array(prompt(LENGTH), np.int32)
    rows = []
    for known in (0, 128):
        sequence = found.open()
        assert found.kv.adopt(sequence, ids) == known
        *_, last = found.prefill(sequence, ids[sequence.length :])
        rows.append(last[-1].copy())
        found.kv.keep(sequence, ids)
        found.release(sequence)
    assert (rows[0] == rows[1]).all()


@pytest.fixture(scope="module")
def split(directory: Path) -> Plan:
    return split_plan(directory, gpus=2, switches=True)


@pytest.mark.slow
def test_devices_ranks_and_lanes(split: Plan, directory: Path, exact: Floats) -> None:
    """The choice stays where it was made, also for the layer that shares it."""
    ids = np.array(prompt(LENGTH), np.int32)
    names = [phase.name for phase in split.phases if phase.name.startswith("prefill")]
    assert STREAM in names and any(phase.ranks == 2 for phase in split.phases)
    with executor(split, directory, delays=3) as found:
        for name in names:
            close(_continued(found, ids, name), exact[139:])
        pair = [found.open(), found.open()]
        for sequence in pair:
            for _ in found.prefill(sequence, ids[:120]):
                pass
        lanes = [found.decode(pair, ids[[at, at]])[1].copy() for at in range(120, 132)]
        close(np.stack(lanes), exact[120:132])
        assert found.calls[DUAL] == 12


def _continued(found: Executor, ids: np.ndarray, phase: str, past: int = 0) -> Floats:
    """Logits of a prompt's last token by a phase, with `past` tokens before it, and of those that
    follow.
    """
    sequence = found.open()
    if past:
        for _ in found.prefill(sequence, ids[:past]):
            pass
    *_, last = found.prefill(sequence, ids[past:140], phase=phase)
    rows = [last[-1].copy()]
    rows += [found.decode([sequence], ids[n : n + 1])[0].copy() for n in range(140, LENGTH)]
    found.release(sequence)
    return np.stack(rows)


@pytest.mark.slow
def test_a_call_goes_on_from_a_past(split: Plan, directory: Path, exact: Floats) -> None:
    """Ranks need the keys of what came before."""
    ids = np.array(prompt(LENGTH), np.int32)
    with executor(split, directory) as found:
        for phase in split.phases:
            if kind_of(phase) == "stream":
                close(_continued(found, ids, phase.name, past=60), exact[139:])


@pytest.mark.slow
def test_ranks_that_are_processes(directory: Path) -> None:
    """They are told the keys of what came before, and give the bits of one process."""
    ids = np.array(prompt(LENGTH), np.int32)
    with bench(directory, 2, compared=True) as found:
        results = []
        for run_by in (found.by_processes, found.in_process):
            sequence = found.kv.open()
            results.append([run_by(sequence, part, 8) for part in (ids[:99], ids[99:])])
            found.kv.release(sequence)
        for mine, here in zip(*results, strict=True):
            np.testing.assert_array_equal(mine, here)


def test_paged_attention_refuses_a_choice(directory: Path) -> None:
    with pytest.raises(UsageError, match="latents that an indexer chooses"):
        split_plan(directory, attention="flashinfer")


def test_decode_is_told_to_read_what_was_chosen(split: Plan) -> None:
    """A step reads every key of an indexer, and no more latents than were chosen."""
    phase, model = split.phase("decode"), CostModel(split)
    for step in phase.steps:
        if step.op not in ("index", "sparse_mla"):
            continue
        calls = [model.step(phase, step, Call(2, context, 2)) for context in (40, 80, 120, 200)]
        read = [call.bytes["gpu"] for call in calls]
        if step.op == "index":
            assert read[0] == read[1]  # nothing is scored
            assert read[3] - read[2] >= 2 * 80 * 2 * 32
        else:
            assert read[1] - read[0] >= 2 * 40 * 2 * 80
            assert read[2] == read[3]
