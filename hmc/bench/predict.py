"""Predicted against measured for whole models: real shapes, cut in depth (and, where a single layer
is too large, in experts) to what memory allows, with random weights; hides the cutting.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hmc.bench.compare import Report, silent
from hmc.bench.model import ModelBench, total_bytes
from hmc.checkpoint.jsonfile import read_object
from hmc.compiler import compile as compile_plan
from hmc.errors import CapacityError, UsageError
from hmc.machine.model import Machine
from hmc.plan import Plan
from hmc.predict.measured import Predictor
from hmc.runtime.executor import Executor

FORMATS = ("fp8", "bf16")
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts")
_QUANTIZED = {
    "fp8": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
}
"""What config.json says of a format that is not told by its dtype."""


def compare(
    config: Path,
    form: str,
    machine: Machine,
    *,
    contexts: Sequence[int],
    prompts: Sequence[int],
    tokens: int,
    repetitions: int,
    memory: int,
    layers: int = 0,
    experts: int = 0,
    megabytes: int = 0,
    report: Report = silent,
) -> Iterator[dict[str, Any]]:
    """Measure the shapes of a config.json in a weight format and predict them from `machine`:
    decode at `contexts`, `tokens` steps around each, and prefill of `prompts`.

    A row of a load holds the figure, the seconds by op of a token (decode) or of the prompt, and as
    "memory_drift", for decode, how much faster the streaming read is now than when the machine was
    probed. At most `memory` bytes of weights; `layers` and `experts` of each layer (0: as many as
    fit, all of them before more layers). Raises `CapacityError` when not even one routed layer of
    16 experts fits.
    """
    longest = max((*prompts, *(each + tokens for each in contexts)), default=1)
    plan = cut_to_fit(config, form, longest, memory, layers, experts)
    predictor = Predictor(plan, machine)
    executor = Executor(plan, None, dummy_weights=True, progress=report)
    try:
        bench = ModelBench(executor, repetitions=repetitions, megabytes=megabytes, report=report)
        starts = [max(0, context - tokens // 2) for context in contexts]
        rows = [row for start in starts for row in bench.decodes(tokens, start)]
        rows += [bench.prompt(length) for length in prompts]
    finally:
        executor.close()
    read = machine.known_rates.read_all
    routed = max((each.count for each in plan.experts), default=0)
    for row in rows:
        figure = predictor.figure(row.load, row.rates)
        ops: dict[str, dict[str, float]] = {}
        for step in predictor.steps(row.load, row.by_step):
            sums = ops.setdefault(step["op"], {"predicted_s": 0.0, "measured_s": 0.0})
            for name in sums:
                sums[name] += step[name]
        yield {
            "model": plan.model.family,
            "format": form,
            "layers": plan.model.layers,
            "experts": routed,
            "test": row.load.name,
            **figure.as_json(),
            "low": figure.low,
            "high": figure.high,
            "memory_drift": row.compared.reference / read if row.load.kind == "decode" else None,
            "ops": ops,
        }


def cut_to_fit(
    config: Path, form: str, context: int, memory: int, layers: int = 0, experts: int = 0
) -> Plan:
    """The plan of a model in a format, cut to `memory` bytes of weights."""
    found = read_object(config / "config.json" if config.is_dir() else config, UsageError)
    every = int(_text(found).get("num_hidden_layers", 1))
    while True:
        cut = _cut(found, form, experts)
        one = _compile(cut, context, min(layers, every)) if layers else None
        plan = one or _deepest(cut, context, every, memory)
        if total_bytes(plan) <= memory:
            return plan
        count = next((int(_text(cut)[name]) for name in _EXPERTS if name in _text(cut)), 0)
        if layers or experts or count <= 16:
            raise CapacityError(
                f"{config}, {form}: {plan.model.layers} layers take"
                f" {total_bytes(plan) / 1e9:.1f} GB of {memory / 1e9:.1f}: cut it with --layers and"
                " --experts, or raise --memory"
            )
        found = _cut(cut, form, count // 2)


def _deepest(cut: dict[str, Any], context: int, every: int, memory: int) -> Plan:
    """As many layers as fit, but one with experts at least (if the model has any)."""
    first = int(_text(cut).get("first_k_dense_replace", 0)) + 1
    least = _compile(cut, context, min(first, every))
    if first >= every or total_bytes(least) > memory:
        return least
    more = _compile(cut, context, first + 1)
    each = total_bytes(more) - total_bytes(least)
    depth = min(every, first + (memory - total_bytes(least)) // each)
    return least if depth == first else _compile(cut, context, depth)


def _compile(cut: dict[str, Any], context: int, layers: int) -> Plan:
    with TemporaryDirectory(prefix="hmc-bench-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(cut))
        return compile_plan(path, max_context=context, dummy_weights=True, layers=layers)


def _cut(config: dict[str, Any], form: str, experts: int) -> dict[str, Any]:
    """The configuration in a weight format, with so many experts (0: its own)."""
    text = _text(config)
    if experts:
        text |= {name: experts for name in _EXPERTS if name in text}
    found = {**config, "text_config": text} if "text_config" in config else text
    for each in (found, text):
        each.pop("quantization_config", None)
    if form in _QUANTIZED:
        found["quantization_config"] = _QUANTIZED[form]
    return found


def _text(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of its language model."""
    return dict(config.get("text_config", config))
