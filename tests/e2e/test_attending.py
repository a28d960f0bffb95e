"""A model whose layers attend in every way (tests/attending.py), from the file to logits: prefill
and decode on the CPU and on devices played by it, against its own float32 reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import attending
import numpy as np
import pytest
import quirky
import torch
from numpy.typing import NDArray
from played import executor
from split_plans import STREAM, split_plan
from test_quirks import IDS, assert_close, logits_of

import hmc
from hmc.models import FAMILIES
from hmc.plan import Plan

Floats = NDArray[np.float32]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FAMILIES, "attending", attending.FAMILY)
        directory = tmp_path_factory.mktemp("attending")
        yield quirky.write(directory, "attending", len(attending.kinds()))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Floats:
    """The reference's logits of every token."""
    with torch.inference_mode():
        model = quirky.reference(checkpoint)
        return model(torch.from_numpy(IDS), torch.arange(len(IDS))).numpy()  # type: ignore[no-any-return]


def test_on_the_cpu(checkpoint: Path, expected: Floats) -> None:
    with hmc.Engine(hmc.compile(checkpoint, max_chunk=16), threads=2) as engine:
        assert_close(engine.logits(IDS.tolist()), expected)
        assert_close(engine.decode_logits(IDS.tolist()), expected)


@pytest.mark.few(1)
@pytest.mark.parametrize("gpus", [1, 2])
def test_on_devices(gpus: int, checkpoint: Path, expected: Floats) -> None:
    plan: Plan = split_plan(checkpoint, gpus=gpus, held=0.4)
    with executor(plan, checkpoint) as found:
        many, few = logits_of(found, STREAM, "decode")
    assert_close(many, expected[-8:])
    assert_close(few, expected[8:])
