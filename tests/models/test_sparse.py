"""Models whose attention is sparse: the choice of an indexer in chunks, in batches, after a prompt
that was known, over several devices and ranks, beyond what they can choose.
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
from rank_bench import bench
from reference import load_model, run
from split_plans import split_plan
from tiny_models import FOLDER, Floats, prompt

import hmc
from hmc.checkpoint.config import load_config
from hmc.errors import UsageError, VerifyError
from hmc.plan import Plan, Step
from hmc.plan.states import StateGroup
from hmc.plan.verify import verify_plan
from hmc.predict.cost import Call, CostModel

SHARING, OTHERS = ("glm_moe_dsa", "mistral_large4"), ("hy_v4",)


def write(directory: Path, family: str) -> None:
    """A model whose layer 2 shares the choice of layer 1 (in Mistral Large 4 layers 1 and 3 share
    latents too, and the last two have none that are rotated), with few experts, all of which are
    taken: no near tie of a router goes another way.
    """
    values = json.loads((FOLDER / f"{family}.json").read_text())
    text = values.get("text_config", values)
    text |= {"n_routed_experts": 4, "num_experts_per_tok": 4, "index_topk": 96}
    write_random(directory, values)


@pytest.fixture(
    scope="module",
    params=[*SHARING, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)],
)
def directory(request: pytest.FixtureRequest, written: Callable[..., Path]) -> Path:
    return written(f"sparse-{request.param}", lambda found: write(found, request.param))


@pytest.fixture(scope="module")
def bound(directory: Path) -> float:
    """Of the median error. Attention to all positions errs by 0.12 and more in GLM-5, by 0.4 and
    more in Mistral Large 4, which has three indexers that near ties of scores lead astray.
    """
    return {"glm_moe_dsa": 0.06, "mistral_large4": 0.15}[
        load_config(directory).values["model_type"]
    ]


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
def test_chunks_give_the_same_bits(engine: hmc.Engine, exact: Floats, bound: float) -> None:
    ids = prompt(LENGTH)
    whole = in_chunks(engine.executor, ids, 64)
    close(whole[110:], exact[110:], bound)
    assert errors(whole, exact)[:96].max() < 0.04  # all are chosen
    for size in (7, 33):
        assert (in_chunks(engine.executor, ids, size) == whole).all()


@pytest.mark.slow
def test_decode_continues(engine: hmc.Engine, exact: Floats, bound: float) -> None:
    decode_continues(engine.executor, exact, (5, 93, 130), bound)


@pytest.mark.slow
def test_a_prompt_goes_on_from_known_blocks(engine: hmc.Engine) -> None:
    goes_on_from_known_blocks(engine.executor)


@pytest.fixture(scope="module")
def split(directory: Path) -> Plan:
    return split_plan(directory, gpus=2, switches=True)


@pytest.mark.slow
def test_devices_ranks_and_lanes(split: Plan, directory: Path, exact: Floats, bound: float) -> None:
    """The choice stays where it was made, also for the layer that shares it."""
    with executor(split, directory, delays=3) as found:
        on_devices_ranks_and_lanes(found, split, exact, 60, bound)


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
            assert read[1] - read[0] >= 2 * 40 * 2 * 64
            assert read[2] == read[3]


def test_latents_that_no_layer_keeps_are_refused(split: Plan) -> None:
    """A step that reads another layer's cache reads what that layer was given."""
    sharing = [step for step in split.phase("decode").steps if "source" in step.attrs]
    assert [(step.layer, step.attrs["source"]) for step in sharing] in ([], [(1, 0), (3, 2)])
    for step in sharing:
        assert step.layer not in {each for g in split.kv.groups if _latent(g) for each in g.layers}
        for source in (step.attrs["source"] ^ 2, step.layer, 3):
            with pytest.raises(VerifyError):
                verify_plan(_changed(split, step, source))


def _latent(group: StateGroup) -> bool:
    return any(state.name == "latent" for state in group.states)


def _changed(plan: Plan, step: Step, source: int) -> Plan:
    """The plan with another source of a step of decode."""
    other = step.model_copy(update={"attrs": {**step.attrs, "source": source}})
    phases = tuple(
        phase.model_copy(
            update={"steps": tuple(other if each == step else each for each in phase.steps)}
        )
        if phase.name == "decode"
        else phase
        for phase in plan.phases
    )
    return plan.model_copy(update={"phases": phases})
