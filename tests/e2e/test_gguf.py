"""A GGUF file and its safetensors twin give the same greedy tokens, for every family, plain type
and layout of tensors that converters have used.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from gguf_files import write_gguf
from hybrid_plans import ONE

import hmc
from hmc.cli import main
from hmc.cli.compile_command import command
from hmc.errors import ShardError, TensorError, UsageError, VerifyError
from hmc.formats.gguf import GGUF
from hmc.plan.stored import check_weights
from hmc.runtime.engine import Engine

IDS = [3, 77, 410, 12, 255, 9, 100, 31, 499, 5, 64]
MADE: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": []},
    "mixtral": {},
    # The file has one number for both.
    "deepseek_v3": {"rope_scaling": {"type": "yarn", "factor": 8.0, "mscale": 0.8,
                                     "mscale_all_dim": 0.8,
                                     "original_max_position_embeddings": 128}},
}  # fmt: skip


def gguf_tensors(path: Path) -> dict[str, np.ndarray]:
    """What gguf reads of a file, in f32."""
    return {
        each.name: gguf.dequantize(each.data, each.tensor_type)
        for each in gguf.GGUFReader(path).tensors
    }


def answer(location: Path) -> tuple[list[int], np.ndarray]:
    """Greedy tokens, and the prompt's logits."""
    plan = hmc.compile(location, max_context=64, threads=1)
    with Engine(plan, threads=1) as engine:
        tokens = engine.generate(IDS, max_new_tokens=8).token_ids
        return list(tokens), engine.logits(IDS)


@pytest.fixture(scope="module")
def twin(checkpoint, tmp_path_factory):
    """`twin(family, stored, type, **options)`: a directory and a GGUF file of the same weights."""

    def get(family: str, stored: str, kind: str, **options: Any) -> tuple[Path, Path]:
        directory = checkpoint(family, stored, **MADE[family])
        folder = tmp_path_factory.mktemp("gguf")
        return directory, write_gguf(folder / "model.gguf", directory, kind, **options)

    return get


KINDS = [("f32", "F32"), ("bf16", "BF16"), ("fp16", "F16")]
QUICK = {("mixtral", "BF16")}
"""Those whose kernels other tests build too; the rest in `make test-all`."""
CASES = [
    pytest.param(family, *each, marks=() if (family, each[1]) in QUICK else pytest.mark.slow)
    for family in MADE
    for each in KINDS
]


@pytest.mark.parametrize(("family", "stored", "kind"), CASES)
def test_a_file_and_its_twin_give_the_same_tokens(twin, family, stored, kind) -> None:
    directory, path = twin(family, stored, kind)
    expected, logits = answer(directory)
    tokens, found = answer(path)
    assert tokens == expected
    if family != "mixtral":  # whose heads are summed in another order
        assert np.array_equal(found, logits)
    assert np.abs(found - logits).max() < 2e-2 * np.abs(logits).max()


@pytest.mark.parametrize(
    ("kind", "kept"), [("BF16", "BF16"), pytest.param("Q8_0", "F32", marks=pytest.mark.slow)]
)
def test_keys_and_values_of_the_latent_apart(checkpoint, tmp_path, kind, kept) -> None:
    """As files of 2025 on have them: joined again when weights are opened, exactly."""
    directory = checkpoint("deepseek_v3", "bf16", **MADE["deepseek_v3"])
    path = write_gguf(
        tmp_path / "a.gguf",
        directory,
        "BF16",
        split_kv_b=True,
        kinds={"k_b_proj": kind, "v_b_proj": kind},
    )
    plan = hmc.compile(path, max_context=64, threads=1)
    joined = [weight for weight in plan.weights if weight.planes[0].parts]
    assert len(joined) == plan.model.layers
    assert {weight.planes[0].dtype for weight in joined} == {kept}
    tensors = gguf_tensors(path)
    with Engine(plan, threads=1) as engine:
        for layer, weight in enumerate(joined):
            keys, values = (tensors[f"blk.{layer}.attn_{each}_b.weight"] for each in "kv")
            expected = np.concatenate((keys.swapaxes(1, 2), values), axis=1)
            found = engine.executor.store.rows(weight.name, 0, weight.shape[0])
            assert np.array_equal(found, expected.reshape(found.shape))
        tokens = engine.generate(IDS, max_new_tokens=8).token_ids
    if kind == "BF16":
        assert list(tokens) == answer(directory)[0]


WIDE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
        "moe_intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2,
        "attention_bias": False, "mlp_only_layers": []}  # fmt: skip
"""Rows of whole blocks of 256."""
MIXED = {"embed_tokens": "Q4_K", "lm_head": "Q6_K", "v_proj": "Q6_K",
         "layers.1.mlp.experts.down": "Q6_K"}  # fmt: skip
"""As files called Q4_K_M are."""


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [
        pytest.param("Q4_K", MIXED, id="Q4_K_M", marks=pytest.mark.slow),
        *(
            pytest.param(kind, {}, id=kind, marks=pytest.mark.slow)
            for kind in (each.title for each in GGUF)
        ),
    ],
)
def test_blocks_and_their_twin_give_the_same_tokens(checkpoint, tmp_path, kind, kinds) -> None:
    directory = checkpoint("qwen3_moe", "f32", layers=2, **WIDE)
    path = write_gguf(tmp_path / "a.gguf", directory, kind, kinds=kinds, twin=tmp_path / "twin")
    expected, logits = answer(tmp_path / "twin")
    tokens, found = answer(path)
    assert tokens == expected
    assert np.abs(found - logits).max() < 1e-3 * np.abs(logits).max()


def test_blocks_leave_gpus_alone(checkpoint, tmp_path) -> None:
    directory = checkpoint("qwen3_moe", "f32", layers=2, **WIDE)
    path = write_gguf(tmp_path / "a.gguf", directory, "Q4_K", kinds=MIXED)
    options = ["-o", str(tmp_path / "a.hmp"), "--machine", ONE]
    told = CliRunner().invoke(command, [str(path), *options])
    assert re.search(r"GPUs unused: \w+: kernels of GPUs read no blocks of GGUF", told.output)


def test_parts_that_are_none_are_refused(checkpoint, tmp_path) -> None:
    directory = checkpoint("deepseek_v3", "bf16", **MADE["deepseek_v3"])
    path = write_gguf(tmp_path / "a.gguf", directory, "BF16", split_kv_b=True)
    plan = hmc.compile(path, max_context=64, threads=1)
    check_weights(plan)
    at, weight = next((at, w) for at, w in enumerate(plan.weights) if w.planes[0].parts)
    plane = weight.planes[0]
    keys = plane.parts[0]
    for change, said in (
        ({"rows": keys.rows + 1}, "no whole heads"),
        ({"rows": 2 * keys.rows + plane.parts[1].rows}, "takes"),
        ({"bytes": keys.bytes - 2}, "takes"),
        ({"dtype": "F16"}, "F16 does not become BF16"),
        ({"dtype": "Q4_K"}, "Q4_K does not become BF16"),
        ({"offset": 10**12}, "outside its shard"),
        ({"offset": plane.parts[1].offset}, "share bytes"),
    ):
        parts = (keys.model_copy(update=change), *plane.parts[1:])
        changed = weight.model_copy(update={"planes": (plane.model_copy(update={"parts": parts}),)})
        weights = (*plan.weights[:at], changed, *plan.weights[at + 1 :])
        with pytest.raises(VerifyError, match=said):
            check_weights(plan.model_copy(update={"weights": weights}))


def test_parts_of_a_file_and_a_tensor_an_expert(twin, tmp_path, capsys) -> None:
    """By the command line; then one part changes."""

    def run(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            main([str(each) for each in arguments])
        found = capsys.readouterr()
        return int(ended.value.code or 0), found.out + found.err

    directory, path = twin("mixtral", "bf16", "BF16", old_experts=True, split=20)
    parts = sorted(path.parent.glob("*.gguf"))
    assert len(parts) > 2 and parts[0].name.startswith("model-00001-of-")
    plan = tmp_path / "plan.hmp"
    assert run("compile", parts[0], "-o", plan, "--max-context", 64, "--threads", 1)[0] == 0
    code, text = run("show", plan)
    assert code == 0 and str(parts[0]) in text
    asked = ("run", plan, "--ids", ",".join(map(str, IDS)), "--threads", 1)
    code, text = run(*asked, "-n", 8, "--json")
    assert code == 0 and json.loads(text)["token_ids"] == answer(directory)[0]
    with parts[1].open("r+b") as file:
        file.seek(60)
        file.write(b"x")
    code, text = run(*asked)
    assert code != 0 and f"{parts[1]}: its header differs" in text
    parts[1].unlink()
    code, text = run(*asked)
    assert code != 0 and f"{parts[1]}: shard is missing" in text


def test_a_file_under_another_name(twin, tmp_path) -> None:
    _, path = twin("mixtral", "bf16", "BF16")
    plan = hmc.compile(path, max_context=64, threads=1)
    moved = path.rename(tmp_path / "moved.gguf")
    with pytest.raises(ShardError, match="no such file"):
        Engine(plan, threads=1)
    with Engine(plan, moved, threads=1) as engine:
        assert engine.text is None and len(engine.generate(IDS, max_new_tokens=2).token_ids) == 2


def test_what_is_refused(twin, tmp_path) -> None:
    _, path = twin("mixtral", "bf16", "BF16")
    with pytest.raises(UsageError, match=r"dummy weights are made from a config\.json"):
        hmc.compile(path, dummy_weights=True)
    _, extra = twin("qwen3_moe", "bf16", "BF16", **{"expert_count": 4})
    with pytest.raises(TensorError, match="4 experts are stacked"):
        hmc.compile(extra)
