"""Measures what docs/models.md shows of each family, and writes it into hmc/models/measured.json:

    PYTHONPATH=.:tests:tests/models python -m measure formats parity speed [--families NAME,..]
    hmc models --markdown > docs/models.md

`formats` are those of experts in the published configurations of a family, `parity` is that of
three tiny models of it. `speed` is that of the first of its published configurations, cut to the
layers up to the first routed one, with as many experts as `--memory` holds, by `hmc bench` in a
process of its own; nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from parity import parity
from tiny_models import families, write

import hmc
from hmc.bench.model import total_bytes
from hmc.checkpoint.config import ModelConfig, load_config
from hmc.machine.detect import detect
from hmc.models import FAMILIES, load
from hmc.models.measured import PATH

PUBLISHED = Path(__file__).parent / "published"
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "moe_top_k", "moe_k", "moe_topk", "top_k_experts")
SEEDS = range(3)


Found = Iterator[tuple[str, Any]]
"""A family, and what was measured of it."""


def measure_formats(names: list[str], memory: float) -> Found:
    """The formats of routed experts."""
    found: dict[str, set[str]] = defaultdict(set)
    for config in _published(names):
        plan = hmc.compile(config.path, machine="laptop", dummy_weights=True, layers=_few(config))
        matrices = (each for each in plan.experts if not each.role.endswith("_bias"))
        found[plan.model.family] |= {each.format for each in matrices}
    yield from ((name, sorted(forms)) for name, forms in found.items())


def measure_parity(names: list[str], memory: float) -> Found:
    """Median errors of hmc and of transformers in BF16."""
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            places = [write(Path(folder) / str(seed), name, seed) for seed in SEEDS]
            prefill, decode, bf16 = (float(np.median(each)) for each in parity(places))
        yield name, {"hmc": round(max(prefill, decode), 5), "bf16": round(bf16, 5)}


def measure_speed(names: list[str], memory: float) -> Found:
    """What `hmc bench` says of one configuration of each family."""
    first = {each.require_str("model_type"): each for each in reversed([*_published(names)])}
    for family, config in sorted(first.items()):
        with tempfile.TemporaryDirectory() as folder:
            cut, words = _fitting(config, Path(folder), memory * 1e9)
            report = _bench(cut)
        rows = {row["test"][:2]: row for row in report["rows"]}
        yield (
            family,
            {
                "shape": f"{config.path.stem}, {words}, {report['formats']}",
                "mbu": rows["tg"]["mbu"],
                "decode": rows["tg"]["tokens_per_second"],
                "peak_share": rows["pp"]["peak_share"],
                "prefill": rows["pp"]["tokens_per_second"],
            },
        )


def _published(names: list[str]) -> Iterator[ModelConfig]:
    for path in sorted(PUBLISHED.glob("*.json")):
        config = load_config(path)
        if config.require_str("model_type") in names:
            yield config


def _few(config: ModelConfig) -> int:
    """Layers up to the first routed one."""
    for layers in range(1, config.text.depth + 1):
        if load(config.with_text(num_hidden_layers=layers)).info.experts:
            return layers
    raise AssertionError(config.path)


def _fitting(config: ModelConfig, folder: Path, memory: float) -> tuple[Path, str]:
    """The configuration with so many experts that the weights of its first layers fit, or as few as
    its router takes.
    """
    layers, key = _few(config), next(key for key in EXPERTS if key in config.text)
    experts = whole = config.text.require_int(key)
    chosen = [config.text.values[each] for each in CHOSEN if each in config.text]
    least = max(np.max(chosen), 2 * config.text.get_int("n_group", 1))
    while True:
        cut = config.with_text(**{key: experts, "num_hidden_layers": layers})
        (folder / "config.json").write_text(json.dumps(cut.values))
        taken = total_bytes(hmc.compile(folder, max_context=1024, dummy_weights=True))
        if taken < memory or experts // 2 < least:
            break
        experts //= 2
    words = f"{layers} layer" + "s" * (layers > 1)
    return folder, words if experts == whole else f"{words}, {experts} of {whole} experts"


def _bench(folder: Path) -> Any:
    command = [sys.executable, "-m", "hmc", "bench", str(folder), "--dummy-weights", "--json"]
    command += ["-p", "512", "-n", "32", "--repetitions", "5"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def main() -> None:
    """Measure, and write what was found beside what was found before."""
    what = {"formats": measure_formats, "parity": measure_parity, "speed": measure_speed}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="+", choices=what)
    parser.add_argument("--families", default="", help="names with commas between them [all]")
    parser.add_argument("--memory", type=float, default=8.0, help="GB of weights")
    asked = parser.parse_args()
    names = asked.families.split(",") if asked.families else families()
    assert {*names} <= {*FAMILIES}, names
    machine = detect()
    where = f"{machine.cores} cores of {machine.cpu}"
    for part in asked.what:
        for name, found in what[part](names, asked.memory):
            print(name, found, flush=True)
            values = json.loads(PATH.read_text())
            place = values.setdefault(part, {})
            if part != "formats":
                place |= {"date": str(date.today()), "machine": where}
                place = place.setdefault("families", {})
            place[name] = found
            PATH.write_text(json.dumps(values, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
