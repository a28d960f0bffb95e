"""Named machines, and machine files with rates."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hybrid_plans import ONE, TWO

from hmc.codegen.isa import best_isa
from hmc.errors import MachineError, UsageError
from hmc.machine.detect import load_machine, named_machines
from hmc.machine.model import Machine

NAMES = ("desktop-rtx3090", "desktop-rtx4090", ONE, TWO, "laptop", "server-h200")


def test_the_named_machines_are_there() -> None:
    assert named_machines() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_named_machine_is_whole(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    assert machine.rates is not None
    assert all(gpu.rates for gpu in machine.gpus)
    assert machine.hybrid is bool(machine.gpus)
    assert sum(node.memory_bytes for node in machine.nodes) == machine.memory_bytes
    assert len(machine.rates.read) == len(machine.nodes)
    assert sum(len(node.cpus) for node in machine.nodes) == machine.cores
    assert {point.format for point in machine.rates.gemv} == {"fp8", "bf16", "int4"}
    assert best_isa(frozenset(machine.flags)).name == "avx512_bf16"
    assert Machine.model_validate_json(machine.model_dump_json()) == machine


def _rates(value: Any) -> Iterator[dict[str, Any]]:
    """All rates of a machine, wherever they are in its file."""
    if isinstance(value, dict) and "fitted_to" in value:
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _rates(each)


@pytest.mark.parametrize("name", NAMES)
def test_every_fitted_rate_says_to_what(name: str) -> None:
    rates = list(_rates(json.loads(load_machine(name).model_dump_json())))
    assert rates or name == "laptop"
    for rate in rates:
        assert rate["source"]
        assert bool(rate["fitted_to"]) == (rate["kind"] in ("fitted", "published")), rate
        claims = re.search("(meets?|met) the published", rate["source"])
        assert rate["fitted_to"] or not claims, rate


def test_at_their_peak_gpus_reach_what_their_data_sheets_say() -> None:
    machine = load_machine(ONE)
    (gpu,), (best,) = machine.gpus, machine.at_peak().gpus
    assert gpu.rates.memory.value < best.rates.memory.value == gpu.rates.memory.peak
    assert best.rates.memory.kind == "data sheet"
    assert best.rates.launch == gpu.rates.launch
    assert machine.at_peak().rates == machine.rates


def test_a_machine_file_and_its_faults(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(load_machine("laptop").model_dump_json())
    assert load_machine(str(path)) == load_machine("laptop")
    path.write_text(path.read_text().replace('"value":85000000000.0', '"value":-1'))
    with pytest.raises(MachineError, match=r"rates\.read\.0\.value"):
        load_machine(str(path))


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        UsageError, match=f"desktop-rtx3090, desktop-rtx4090, {ONE}, {TWO}, laptop, server-h200"
    ):
        load_machine("nonesuch")


def test_memory_of_a_device() -> None:
    machine = load_machine(TWO)
    assert machine.memory_of("gpu1") == machine.gpus[1].memory_bytes
    with pytest.raises(KeyError, match="no device gpu2"):
        machine.memory_of("gpu2")
