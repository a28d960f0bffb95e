"""MiniMax-M3 beyond the blocks that a token can choose: in chunks, in batches, after a prompt that
was known, over several devices, ranks and lanes.
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
from reference import load_model, run
from safetensors.torch import save_file
from split_plans import DUAL, STREAM, split_plan
from tiny_models import FOLDER, Floats, prompt

import hmc
from hmc.checkpoint.config import ModelConfig, load_config
from hmc.errors import ConfigError, HmcError, UnsupportedError, UsageError
from hmc.models import load, weight_specs
from hmc.plan import Plan
from hmc.predict.cost import Call, CostModel
from hmc.runtime.executor import Executor

LENGTH = 150
CHOSEN = 64
"""Positions that a token reads: 8 blocks of 8."""


def write(directory: Path) -> None:
    """With few experts, all of which are taken: no near tie of a router goes another way."""
    values = json.loads((FOLDER / "minimax_m3_vl.json").read_text())
    del values["vision_config"]
    text = values["text_config"]
    text |= {"num_local_experts": 4, "num_experts_per_tok": 4}
    text |= {"head_dim": 64, "partial_rotary_factor": 0.5}  # as paged attention takes them
    text["sparse_attention_config"] |= {"sparse_block_size": 8, "sparse_topk_blocks": 8}
    (directory / "config.json").write_text(json.dumps(values))
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, spec in sorted(weight_specs(load(load_config(directory)).module).items()):
        for each in [name.format(e=e) for e in range(spec.experts)] or [name]:
            drawn = draw(each, torch.empty(spec.shape), False, generator)
            tensors[each] = drawn if name.endswith("bias") else drawn.to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def directory(written: Callable[..., Path]) -> Path:
    return written("block-sparse", write)


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
    """A near tie of an indexer may go another way for some tokens."""
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
    close(whole[CHOSEN:], exact[CHOSEN:])
    assert np.median(errors(whole, exact)[:CHOSEN]) < 0.025  # all are chosen
    for size in (7, 33):
        assert (in_chunks(engine.executor, ids, size) == whole).all()


@pytest.mark.slow
def test_attention_is_dense_while_all_is_chosen(
    engine: hmc.Engine, directory: Path, tmp_path: Path, exact: Floats
) -> None:
    """To the bit; where more can be chosen, tokens beyond are others."""
    values = json.loads((directory / "config.json").read_text())
    values["text_config"]["sparse_attention_config"]["sparse_topk_blocks"] = 32
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    ids = prompt(LENGTH)
    sparse = in_chunks(engine.executor, ids, 64)
    with hmc.Engine(hmc.compile(tmp_path, max_context=256, max_chunk=64), threads=2) as other:
        dense = in_chunks(other.executor, ids, 64)
    assert (dense[:CHOSEN] == sparse[:CHOSEN]).all()
    assert np.median(errors(dense, exact)[-32:]) > 0.12


@pytest.mark.slow
def test_decode_continues(engine: hmc.Engine, exact: Floats) -> None:
    """Of several sequences together, each at its own position."""
    ids, found = prompt(LENGTH), engine.executor
    lengths = (5, 60, 130)
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
    ids = np.array(prompt(LENGTH), np.int32)
    names = [phase.name for phase in split.phases if phase.name.startswith("prefill")]
    assert STREAM in names and any(phase.ranks == 2 for phase in split.phases)
    with executor(split, directory, delays=3) as found:
        for name in names:
            for past in (0, 60):
                sequence = found.open()
                for _ in found.prefill(sequence, ids[:past]) if past else ():
                    pass
                *_, last = found.prefill(sequence, ids[past:140], phase=name)
                rows = [last[-1].copy()]
                for at in range(140, LENGTH):
                    rows.append(found.decode([sequence], ids[at : at + 1])[0].copy())
                found.release(sequence)
                close(np.stack(rows), exact[139:])
        pair = [found.open(), found.open()]
        for sequence in pair:
            for _ in found.prefill(sequence, ids[:120]):
                pass
        lanes = [found.decode(pair, ids[[at, at]])[1].copy() for at in range(120, 132)]
        close(np.stack(lanes), exact[120:132])
        assert found.calls[DUAL] == 12


def test_paged_attention_refuses_a_choice(directory: Path) -> None:
    with pytest.raises(UsageError, match="blocks that an indexer chooses"):
        split_plan(directory, attention="flashinfer")


def test_decode_is_told_to_read_what_was_chosen(split: Plan) -> None:
    """A step reads every key of an indexer, and no more keys and values than were chosen."""
    phase, model = split.phase("decode"), CostModel(split)
    steps = {step.op: step for step in phase.steps if step.layer == 1}
    read = {
        op: [
            model.step(phase, steps[op], Call(2, context, 2)).bytes["gpu"]
            for context in (20, 40, 120, 200)
        ]
        for op in ("index_blocks", "sparse_attention")
    }
    first, second, third, fourth = read["index_blocks"]
    assert first == second  # nothing is scored
    assert fourth - third >= 2 * 80 * 2 * 64
    first, second, third, fourth = read["sparse_attention"]
    assert second - first >= 2 * 20 * 2 * 2 * 128
    assert third == fourth


@pytest.mark.parametrize(
    ("changes", "named", "kind"),
    [
        ({"sparse_score_type": "mean"}, "sparse_score_type", UnsupportedError),
        ({"sparse_init_block": 1}, "sparse_init_block", UnsupportedError),
        ({"sparse_block_size": 5}, "sparse_block_size", UnsupportedError),
        ({"sparse_num_index_heads": 3}, "sparse_num_index_heads", UnsupportedError),
        ({"sparse_disable_index_value": [1, 1, 0]}, "sparse_disable_index_value", HmcError),
        ({"sparse_attention_freq": [0, 2, 1]}, "sparse_attention_freq", ConfigError),
        ({"sparse_local_block": 9}, "sparse_local_block", ConfigError),
        ({"sparse_index_dim": 8}, "sparse_index_dim", ConfigError),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_indexers_that_are_others_are_refused(
    changes: dict[str, object], named: str, kind: type[HmcError]
) -> None:
    values = json.loads((FOLDER / "minimax_m3_vl.json").read_text())
    values["text_config"]["sparse_attention_config"] |= changes
    with pytest.raises(kind, match=named):
        load(ModelConfig(Path("config.json"), values, ""))
