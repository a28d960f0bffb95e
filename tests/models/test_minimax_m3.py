"""MiniMax-M3 beyond the blocks that a token can choose: in chunks, in batches, after a prompt that
was known, over several devices, ranks and lanes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from beyond_choice import (
    LENGTH,
    close,
    decode_continues,
    goes_on_from_known_blocks,
    in_chunks,
    on_devices_ranks_and_lanes,
    write_random,
)
from parity import errors
from played import executor
from reference import load_model, run
from split_plans import split_plan
from tiny_models import FOLDER, Floats, prompt

import hmc
from hmc.checkpoint.config import ModelConfig
from hmc.errors import ConfigError, HmcError, UnsupportedError, UsageError
from hmc.models import load
from hmc.plan import Plan
from hmc.predict.cost import Call, CostModel

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
    write_random(directory, values)


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
    decode_continues(engine.executor, exact, (5, 60, 130))


@pytest.mark.slow
def test_a_prompt_goes_on_from_known_blocks(engine: hmc.Engine) -> None:
    goes_on_from_known_blocks(engine.executor)


@pytest.fixture(scope="module")
def split(directory: Path) -> Plan:
    return split_plan(directory, gpus=2, switches=True)


@pytest.mark.slow
def test_devices_ranks_and_lanes(split: Plan, directory: Path, exact: Floats) -> None:
    with executor(split, directory, delays=3) as found:
        on_devices_ranks_and_lanes(found, split, exact, 60)


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
