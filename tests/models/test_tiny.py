"""Every family by its tiny model, and the same tests for all: against transformers, on devices, and
against itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import errors, parity, tiny_plan
from played import executor
from reference import load_model, run
from split_plans import STREAM, split_plan
from tiny_models import families, oracle, prompt

import hmc
from hmc.checkpoint import Checkpoint
from hmc.checkpoint.config import load_config
from hmc.errors import HmcError
from hmc.graph.printer import graph_text
from hmc.models import FAMILIES, load
from hmc.passes.graph.trace import trace
from hmc.plan.file import canonical_json

SEEDS = (0, 1, 2)
ALL = pytest.mark.parametrize("family", families())
QUICK = {"llama4"}
"""Families whose kernels `make test` runs here: other tests run those of the first three."""

Tiny = Callable[..., Path]


def test_every_family_has_a_tiny_model() -> None:
    assert families() == sorted(FAMILIES)


@ALL
def test_golden(family: str, tiny: Tiny, golden: Callable[[str, str], None]) -> None:
    """The trace, of layers that are alike the first."""
    graph = trace(load(load_config(tiny(family))).module)
    golden(f"models/{family}.txt", _kinds_of_layers(graph_text(graph.graph)))


def _kinds_of_layers(text: str) -> str:
    layers: dict[int, list[str]] = {-1: []}
    for line in text.splitlines(keepends=True):
        found = re.search(r" @(\d+) ", line.split("(")[0])
        layers.setdefault(int(found[1]) if found else -1, []).append(line)
    outside = layers.pop(-1)
    seen: dict[str, int] = {}
    parts = []
    for number, lines in sorted(layers.items()):
        shape = re.sub(r"(?<=add_)\d+|(?<=layers[._])\d+|@\d+|\([^)]*\)", "", "".join(lines))
        if shape in seen:
            parts.append(f"layer {number} as {seen[shape]}\n")
        else:
            seen[shape] = number
            parts += lines
    return "".join((*outside[:3], *parts, *outside[3:]))


@ALL
def test_blocks(family: str, tiny: Tiny) -> None:
    """In float32 they give what transformers gives."""
    directory = tiny(family)
    exact = oracle(directory, torch.float32)
    blocks = run(load_model(directory).module, prompt()).numpy()
    assert np.abs(blocks - exact).max() < 2e-4 * np.abs(exact).max()


@pytest.mark.parametrize(
    "family",
    [each if each in QUICK else pytest.param(each, marks=pytest.mark.slow) for each in families()],
)
def test_parity(family: str, tiny: Tiny) -> None:
    """Kernels err no more than transformers in BF16 does, but for what one run may have by
    chance.
    """
    _assert_as_close_as_bf16([tiny(family)], slack=1.5, flips=0.2)


@pytest.mark.slow
@ALL
def test_parity_over_seeds(family: str, tiny: Tiny) -> None:
    """One flip of a router at an early token decides a run: several are taken together."""
    directories = [tiny(family, seed) for seed in SEEDS]
    _assert_as_close_as_bf16(directories, slack=1.05, flips=0.08)


def _assert_as_close_as_bf16(directories: list[Path], slack: float, flips: float) -> None:
    """The median error is at most `slack` times that of transformers in BF16. `flips` is the share
    of tokens that may err by over 5 % beyond those of transformers: a near tie of a router goes
    another way in each arithmetic, and tokens after it hear of it.
    """
    *ours, bound = parity(directories)
    for found in ours:
        assert np.median(found) <= slack * np.median(bound), (np.median(found), np.median(bound))
        assert (found > 0.05).mean() <= (bound > 0.05).mean() + flips


@pytest.mark.slow
@ALL
def test_devices(family: str, tiny: Tiny) -> None:
    """GPUs that the CPU plays give what the CPU alone gives, whatever of the prompt they take."""
    directory = tiny(family)
    with hmc.Engine(tiny_plan(directory), threads=2) as engine:
        expected = engine.decode_logits(prompt())
    plan = split_plan(directory, max_context=64, max_chunk=32, switches=True)
    names = [phase.name for phase in plan.phases]
    assert STREAM in names
    with executor(plan, directory) as found:
        for phase in (name for name in names if name.startswith("prefill")):
            sequence = found.open()
            ids = np.array(prompt(), np.int32)
            *_, last = found.prefill(sequence, ids[:-2], phase=phase)
            rows = [last[-1].copy()]
            rows += [found.decode([sequence], ids[-2 + n :][:1])[0].copy() for n in range(2)]
            found.release(sequence)
            assert np.median(errors(np.stack(rows), expected[-3:])) < 0.03, phase


@pytest.mark.slow
@ALL
def test_greedy(family: str, tiny: Tiny) -> None:
    """Tokens depend neither on threads nor on who shares the batch."""
    directory, answers = tiny(family), set()
    for threads in (1, 2, 3):
        with hmc.Engine(tiny_plan(directory), threads=threads) as engine:
            answer = engine.generate(prompt(20), max_new_tokens=12).token_ids
            answers.add(tuple(answer))
            alone = [engine.decode_logits(prompt(n)) for n in (3, 9)]
            sequences = [engine.executor.open() for _ in alone]
            for position in range(3):
                ids = np.array([prompt(n)[position] for n in (3, 9)], np.int32)
                rows = engine.executor.decode(sequences, ids)
                for row, one in zip(rows, alone, strict=True):
                    assert np.array_equal(row, one[position])
    assert len(answers) == 1


@pytest.mark.slow
@ALL
def test_plan_is_deterministic(family: str, tiny: Tiny) -> None:
    assert canonical_json(tiny_plan(tiny(family))) == canonical_json(tiny_plan(tiny(family)))


@ALL
def test_tensors_left_aside_are_counted(family: str, tiny: Tiny) -> None:
    """Each of the checkpoint's tensors is read, or counted with a reason."""
    directory = tiny(family)
    plan = tiny_plan(directory)
    aside = [each for each in plan.decisions if each.by == "checkpoint"]
    counted = sum(int(each.choice.split()[0]) for each in aside)
    tensors = Checkpoint.open(directory).tensors
    spans = [(each.offset, each.nbytes) for each in tensors.values()]
    planes = {plane.offset for weight in plan.weights for plane in weight.planes}
    for each in plan.experts:
        planes.update(place for plane in each.planes for place in accumulate(plane.offsets))
    read = sum(any(0 <= place - at < size for place in planes) for at, size in spans)
    assert all(each.reason for each in aside)
    assert counted + read == len(tensors)


WRONG: dict[str, Any] = {
    "hidden_size": "192",
    "num_hidden_layers": None,
    "num_attention_heads": 0,
    "num_experts_per_tok": 99,
    "moe_top_k": 99,
    "moe_layers_enum": "1,x",
    "partial_rotary_factors": [0.5],
    "swiglu_limits": "none",
    "attention_other_setting": {"num_attention_heads": 5},
    "zero_centered": "yes",
    "moe_topk": 99,
    "moe_k": 99,
    "hidden_act": "mish",
    "rope_scaling": {"rope_type": "nonesuch"},
    "rope_theta": -1,
    "mlp_layer_types": ["sparse", "hollow"],
    "n_group": 5,
    "topk_group": 9,
    "scoring_func": "tanh",
    "no_rope_layers": [1, 2, 0],
    "attention_chunk_size": 0,
    "attn_temperature_tuning": "yes",
    "floor_scale": 0,
}
"""Values that no family can take; each is tried where a configuration has the key."""


@ALL
def test_wrong_values_are_named(family: str, tiny: Tiny) -> None:
    config = load_config(tiny(family))
    for key, value in WRONG.items():
        if key not in config.text:
            continue
        with pytest.raises(HmcError) as caught:
            load(config.with_text(**{key: value}))
        message = str(caught.value)
        assert key.removesuffix("_scaling") in message and "config.json" in message
        assert "\n" not in message
