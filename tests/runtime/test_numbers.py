"""FP8 weights with NaN codes are refused by name where kernels would take them for numbers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import hmc
from hmc.codegen.isa import best_isa
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.errors import TensorError
from hmc.plan import Plan
from hmc.runtime.host import nan_scan as numbers
from hmc.runtime.host.nan_scan import check_numbers
from hmc.runtime.host.pool import Pool
from hmc.runtime.weights.store import WeightStore
from hmc.runtime.weights.tensors import Key, tensor_groups

JIT = Jit(EMITTERS)


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(JIT, best_isa(), 2) as pool:
        yield pool


@pytest.fixture
def copy(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may spoil."""
    for path in checkpoint("qwen3_moe", "fp8").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def spoil(plan: Plan, directory: Path, key: Key, number: int, code: int) -> None:
    """Make the last code of a tensor `code`, in its file."""
    (group,) = (group for group in tensor_groups(plan) if group.key == key)
    shard = directory / plan.checkpoint.shards[group.shards[number]].name
    with shard.open("r+b") as file:
        file.seek(int(group.offsets[number]) + group.form.stored_bytes - 1)
        file.write(bytes([code]))


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("expert", [True, False])
@pytest.mark.parametrize("piece", [100, 1 << 20])
def test_the_tensor_is_named(
    copy: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch, code: int, expert: bool, piece: int
) -> None:
    monkeypatch.setattr(numbers, "_PIECE", piece)
    monkeypatch.setattr(numbers, "_CALL", 7)
    plan = hmc.compile(copy)
    about = plan.experts[-2]
    name = "model.layers.0.self_attn.o_proj.weight"
    key: Key = ("expert", about.layer, about.role, "codes") if expert else ("weight", name, "codes")
    number = 5 if expert else 0
    name = about.pattern.format(e=number) if expert else name
    spoil(plan, copy, key, number, code)
    store = WeightStore.open(plan, copy)
    with pytest.raises(TensorError, match=f"^{re.escape(name)}: its FP8 codes hold a NaN"):
        check_numbers(store, pool, JIT, "avx2")
    check_numbers(store, pool, JIT, "avx512_bf16")  # whose kernels give NaN themselves
    store.close()


def test_all_is_read_once(copy: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numbers, "_CALL", 7)
    plan = hmc.compile(copy)
    store = WeightStore.open(plan, copy)
    seen: list[tuple[str, int, int]] = []
    check_numbers(store, pool, JIT, "avx2", lambda *told: seen.append(told))
    fp8 = [w.planes[0].bytes for w in plan.weights if w.format == "fp8"]
    fp8 += [e.planes[0].bytes * e.count for e in plan.experts if e.format == "fp8"]
    assert seen[-1] == ("checking weights", sum(fp8), sum(fp8))
    assert np.all(np.diff([done for _, done, _ in seen]) > 0)
    store.close()


def test_an_engine_refuses_or_gives_nan(copy: Path) -> None:
    """Never a number: on every machine a NaN weight ends in an error that says so."""
    plan = hmc.compile(copy)
    about = plan.experts[-2]
    spoil(plan, copy, ("expert", about.layer, about.role, "codes"), 5, 0x7F)
    if numbers.takes_nan(plan.isa, "fp8"):
        with pytest.raises(TensorError, match=re.escape(about.pattern.format(e=5))):
            hmc.Engine(plan)
        return
    with hmc.Engine(plan) as engine:
        assert np.isnan(engine.logits(list(range(200)))).any()
