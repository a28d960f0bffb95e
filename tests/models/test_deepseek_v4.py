"""DeepSeek-V4 beyond what all families are tested for: contexts in which every kind of layer has
compressed rows, prompts that begin alike, batches, and weights stored as published.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from played import executor
from reference import load_model, run
from safetensors.torch import save_file
from split_plans import DUAL, STREAM, split_plan
from tiny_models import FOLDER

import hmc
from hmc.checkpoint.config import load_config
from hmc.errors import ExecutionError, HmcError
from hmc.formats import FORMATS
from hmc.models import load, weight_specs
from hmc.runtime.executor import Executor

LONG, BLOCK = 290, 64
CLOSE = 0.03


def ids_of(tokens: int, seed: int = 0) -> list[int]:
    return [int(n) for n in np.random.default_rng(seed).integers(2, 500, tokens)]


def errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


def random_tensors(config: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model of a config.json, in float32 but for the tables of experts."""
    generator, tensors = torch.Generator().manual_seed(2), {}
    model = load(load_config(config))
    for name, spec in sorted(weight_specs(model.module).items()):
        shape = spec.view.shape if spec.view else spec.shape
        for each in [spec.name.format(e=e) for e in range(spec.experts)] or [spec.name]:
            if spec.dtype == "I64":
                order = torch.rand(shape[0], model.info.experts, generator=generator)
                tensors[each] = order.argsort(-1)[:, : shape[1]].contiguous()
                continue
            noise = torch.randn(shape, generator=generator)
            gain = 1.0 if name == "embed.weight" else 1 / math.sqrt(shape[-1])
            tensors[each] = 1 + 0.1 * noise if noise.ndim == 1 else gain * noise
    return tensors


def put(directory: Path, values: dict[str, object], tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def values() -> dict[str, object]:
    found: dict[str, object] = json.loads((FOLDER / "deepseek_v4.json").read_text())
    return found | {"num_hidden_layers": 3, "o_lora_rank": 128}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, values: dict[str, object]) -> Path:
    """A checkpoint of three layers, one of each kind."""
    found = tmp_path_factory.mktemp("v4")
    (found / "config.json").write_text(json.dumps(values))
    return put(found, values, random_tensors(found))


@pytest.fixture(scope="module")
def exact(directory: Path) -> np.ndarray:
    """Logits by the blocks, which test_tiny.py compares with transformers."""
    return run(load_model(directory).module, ids_of(LONG)).numpy()


@pytest.fixture(scope="module")
def plan(directory: Path) -> hmc.Plan:
    return hmc.compile(directory, max_context=320, max_chunk=96, threads=2)


@pytest.fixture(scope="module")
def engine(plan: hmc.Plan) -> Iterator[hmc.Engine]:
    with hmc.Engine(plan) as found:
        yield found


def of_chunks(found: Executor, ids: list[int], size: int) -> np.ndarray:
    """The last logits of every chunk."""
    sequence, rows = found.open(), []
    for at in range(0, len(ids), size):
        part = np.array(ids[at : at + size], np.int32)
        rows.append(found.append(sequence, part, np.array([len(part) - 1], np.int32))[0].copy())
    found.release(sequence)
    return np.stack(rows)


@pytest.mark.slow
@pytest.mark.parametrize("size", [7, 64, 96])
def test_chunks(engine: hmc.Engine, exact: np.ndarray, size: int) -> None:
    """However a prompt is cut, layers of 4 and of 128 tokens a row see the same."""
    found = of_chunks(engine.executor, ids_of(LONG), size)
    ends = [min(at + size, LONG) - 1 for at in range(0, LONG, size)]
    assert np.median(errors(found, exact[ends])) < CLOSE


@pytest.mark.slow
def test_decode_goes_on_where_a_prompt_ends(engine: hmc.Engine, exact: np.ndarray) -> None:
    """Past the end of the second row of 128 tokens, beside sequences of other lengths."""
    ids, found = ids_of(LONG), engine.executor
    long, other = found.open(), found.open()
    for _ in found.prefill(long, np.array(ids[:250], np.int32)):
        pass
    rows = []
    for step in range(40):
        both = np.array([ids[250 + step], ids[step]], np.int32)
        rows.append(found.decode([long, other], both).copy())
    for sequence in (long, other):
        found.release(sequence)
    of_long, of_other = np.stack(rows, 1)
    assert np.median(errors(of_long, exact[250:290])) < CLOSE
    assert np.median(errors(of_other, exact[:40])) < CLOSE


@pytest.mark.slow
def test_prompts_that_begin_alike(engine: hmc.Engine, directory: Path) -> None:
    """Rows of 128 tokens are shared with the page of the last of these."""
    found, head = engine.executor, ids_of(3 * BLOCK, 7)
    module = load_model(directory).module
    tails = ids_of(30, 8), ids_of(20, 9), ids_of(100, 10), ids_of(100, 10)
    for tail, cached in zip(tails, (0, 3, 3, 4), strict=True):
        ids, sequence = np.array(head + tail, np.int32), found.open()
        assert found.kv.adopt(sequence, ids) == cached * BLOCK
        found.kv.reserve(sequence, len(ids) - sequence.length)
        last = np.zeros(0)
        for part in found.prefill(sequence, ids[sequence.length :], phase="prefill.host"):
            found.kv.keep(sequence, ids)
            last = part.copy()
        expected = run(module, ids.tolist()).numpy()[-1]
        assert errors(last[-1], expected) < 2 * CLOSE
        found.release(sequence)


def test_the_cache_grows_by_compressed_rows_alone(plan: hmc.Plan) -> None:
    """A row of keys a 4 tokens, of 64 and of an indexer's 32 columns; one a 64 for those of 128."""
    kv = plan.kv
    assert kv.bytes_per_token == 2 * (64 // 4 + 32 // 4 + 64 // 64)
    kept = {state.name for _, state in kv.each() if state.per == "sequence"}
    assert kept == {"window", "rows_open", "index_rows_open"}


@pytest.mark.slow
def test_long_prompts_on_devices(directory: Path, exact: np.ndarray) -> None:
    plan = split_plan(directory, switches=True, max_context=320)
    ids = ids_of(LONG)
    with executor(plan, directory) as found:
        for phase in ("prefill.host", STREAM):
            sequence = found.open()
            *_, last = found.prefill(sequence, np.array(ids[:250], np.int32), phase=phase)
            rows = [last[-1].copy()]
            rows += [found.decode([sequence], np.array([n], np.int32))[0].copy() for n in ids[250:]]
            found.release(sequence)
            assert np.median(errors(np.stack(rows), exact[249:])) < CLOSE
        several, lengths = [found.open() for _ in range(3)], (140, 3, 20)
        for sequence, length in zip(several, lengths, strict=True):
            for _ in found.prefill(sequence, np.array(ids[:length], np.int32)):
                pass
        for step in range(4):
            tokens = np.array([ids[length + step] for length in lengths], np.int32)
            logits = found.decode(several, tokens)
            ends = [length + step for length in lengths]
            assert np.median(errors(logits, exact[ends])) < CLOSE
        assert found.calls[DUAL] > 0


# -- stored as published ---------------------------------------------------------------------------


def exponents(largest: torch.Tensor, most: float) -> torch.Tensor:
    """Bytes of E8M0 that bring numbers up to `largest` below `most`."""
    return (torch.log2(largest / most).ceil() + 127).to(torch.uint8)


def fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes, E8M0 scales of 128 x 128, and what they mean."""
    rows, columns = weight.shape
    padded = torch.zeros(-(-rows // 128) * 128, -(-columns // 128) * 128)
    padded[:rows, :columns] = weight
    blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scale = exponents(blocks.abs().amax((1, 3)), 448)
    spread = torch.exp2(scale.float() - 127).repeat_interleave(128, 0).repeat_interleave(128, 1)
    spread = spread[:rows, :columns]
    codes = (weight / spread).to(torch.float8_e4m3fn)
    return codes, scale.view(torch.float8_e8m0fnu), codes.float() * spread


def fp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two codes a byte, the first in the low half; E8M0 scales of 32 columns; what they mean."""
    worth = torch.tensor(FORMATS["mxfp4"].values)
    groups = weight.unflatten(1, (-1, 32))
    scale = exponents(groups.abs().amax(2), 6)
    spread = torch.exp2(scale.float() - 127)[..., None]
    codes = (groups / spread)[..., None].sub(worth).abs().argmin(-1)
    means = (worth[codes] * spread).flatten(1)
    low, high = codes.flatten(1)[:, ::2], codes.flatten(1)[:, 1::2]
    packed = (low | high << 4).to(torch.uint8).view(torch.int8)
    return packed, scale.view(torch.float8_e8m0fnu), means


_CODED = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3")


@pytest.mark.slow
def test_weights_as_published(tmp_path: Path, directory: Path, values: dict[str, object]) -> None:
    """Experts in FP4 with E8M0 scales of 32, the rest in FP8 of 128 x 128, `.scale` beside both."""
    stored, plain = {}, {}
    for name, weight in random_tensors(directory).items():
        module = name.removesuffix(".weight")
        coded = module.rpartition(".")[2] in _CODED and ".compressor." not in name
        if not coded:
            kept = weight if weight.ndim == 1 or weight.dtype == torch.int64 else weight.bfloat16()
            stored[name], plain[name] = kept, kept
            continue
        encode = fp4 if ".experts." in name else fp8
        stored[name], stored[f"{module}.scale"], plain[name] = encode(weight)
    section = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0"}
    section |= {"activation_scheme": "dynamic", "weight_block_size": [128, 128]}  # type: ignore[dict-item]
    more = {**values, "expert_dtype": "fp4", "quantization_config": section}
    quantised = put(tmp_path / "stored", more, stored)
    exact = run(load_model(put(tmp_path / "plain", values, plain)).module, ids_of(60)).numpy()
    plan = hmc.compile(quantised, max_context=128, max_chunk=32, threads=2)
    assert {each.format for each in plan.experts} == {"mxfp4-i8"}
    assert {w.format for w in plan.weights if ".attn.wo_a" in w.name} == {"fp8"}
    with hmc.Engine(plan) as found:
        assert np.median(errors(found.logits(ids_of(60)), exact)) < CLOSE
        assert np.median(errors(found.decode_logits(ids_of(60)), exact)) < CLOSE


@pytest.mark.slow
def test_a_table_of_other_experts_is_refused(
    tmp_path: Path, directory: Path, values: dict[str, object]
) -> None:
    tensors = random_tensors(directory)
    tensors["layers.1.ffn.gate.tid2eid"][3, 0] = 16
    plan = hmc.compile(put(tmp_path / "wrong", values, tensors), max_context=64, threads=1)
    with pytest.raises(ExecutionError, match=r"layers\.1\.ffn\.gate\.tid2eid names others than"):
        hmc.Engine(plan)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("compress_ratios", [0, 4, 8]),
        ("compress_ratios", [0, 4]),
        ("o_groups", 3),
        ("qk_rope_head_dim", 128),
        ("hidden_act", "gelu"),
        ("norm_topk_prob", False),
        ("hc_mult", 1),
    ],
)
def test_wrong_values_are_named(directory: Path, key: str, value: object) -> None:
    with pytest.raises(HmcError, match=key):
        load(load_config(directory).with_text(**{key: value}))
