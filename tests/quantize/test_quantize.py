"""`hmc quantize`: what the copy holds, by readers of their own; that it is resumed, refused where
it would be wrong, and that the bundled model still writes English.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import read_dequantised
from safetensors.torch import load_file

import hmc
from hmc.cli import main
from hmc.errors import HmcError, UsageError
from hmc.formats import FORMATS
from hmc.quantize import write
from hmc.quantize.encode import ENCODINGS
from hmc.quantize.write import REPORT_NAME, quantize

TINY = Path(__file__).parents[2] / "examples" / "tiny-kjv"


@pytest.mark.parametrize(("form", "most"), [("int4", 0.13), ("mxfp4", 0.13), ("fp8", 0.03)])
def test_random_matrices(form: str, most: float) -> None:
    encoding = ENCODINGS[form]
    group = encoding.groups[-1]
    w = torch.randn((200, 384), generator=torch.Generator().manual_seed(1)) * 0.02
    w[:, 128:256] *= 50
    w[7] = 0
    planes = encoding.planes(w, group)
    for plane, (_, shape) in zip(planes, encoding.shapes((200, 384), group), strict=True):
        assert tuple(plane.shape) == shape
    lost, whole = encoding.error(w, planes, group)
    assert 0 < (lost / whole) ** 0.5 < most
    assert encoding.error(w, planes, group) == (lost, whole)


def test_codes_are_the_nearest() -> None:
    """By search over all codes, for the scales that were chosen."""
    w = torch.randn((4, 64), generator=torch.Generator().manual_seed(2))
    values = np.array(FORMATS["mxfp4"].values)
    codes, scales = ENCODINGS["mxfp4"].planes(w, 32)
    scale = 2.0 ** (scales.numpy().astype(float) - 127).repeat(32, 1)
    both = np.stack([codes.numpy() & 15, codes.numpy() >> 4], -1).reshape(4, 64)
    nearest = np.abs(values - (w.numpy() / scale)[..., None]).min(-1)
    np.testing.assert_allclose(np.abs(values[both] - w.numpy() / scale), nearest, atol=1e-6)


@pytest.mark.slow
def test_the_bundled_model_still_writes_english(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, plan = tmp_path / "copy", tmp_path / "tiny.hmp"

    def run(*words: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return str(out)

    assert "328 tensors as int4" in run("quantize", TINY, "-o", copy, "--format", "int4")
    report = json.loads((copy / REPORT_NAME).read_text())
    assert 0.05 < max(report["errors"].values()) < 0.12
    assert "chooses experts" in set(report["kept"].values())
    original, found = read_dequantised(TINY), load_file(copy / "model.safetensors")
    for name, error in list(report["errors"].items())[::40]:
        words, scale = found[f"{name}_packed"], found[f"{name}_scale"].float()
        nibbles = (words[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32) & 15) - 8
        w = nibbles.flatten(1) * scale.repeat_interleave(32, 1)
        assert found[f"{name}_shape"].tolist() == list(w.shape)
        lost = (w - original[name]).norm() / original[name].norm()
        assert abs(float(lost) - error) < 1e-3
    run("compile", copy, "-o", plan)
    assert "INT4 symmetric" in hmc.load_plan(plan).checkpoint.lossy
    assert "by hmc quantize" in run("show", plan)
    said = run("run", plan, "-p", "And it came to pass", "-n", "60", "--seed", "7")
    words_of_it = said.replace(",", " ").replace(".", " ").split()
    common = {"the", "and", "of", "to", "that", "in", "he", "shall", "unto", "I", "him", "LORD"}
    assert len(words_of_it) > 30
    assert sum(word in common for word in words_of_it) > len(words_of_it) // 5


def test_a_copy_that_ended_is_finished(
    tmp_path: Path, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, copy = checkpoint("qwen3_moe", "bf16", shards=2), tmp_path / "copy"
    whole, replace, renamed = tmp_path / "whole", write.os.replace, []

    def once(old: Path, new: Path) -> None:
        renamed.append(new)
        if Path(new).suffix == ".safetensors" and len(renamed) > 2:
            raise OSError(28, "No space left on device")
        replace(old, new)

    with monkeypatch.context() as patched:
        patched.setattr(write.os, "replace", once)
        with pytest.raises(HmcError, match="No space left"):
            quantize(source, copy, "int4")
    assert not (copy / "config.json").exists()
    again = quantize(source, copy, "int4")
    assert again == quantize(source, whole, "int4")
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in copy.iterdir() if path.name[0] != ".") == names
    for name in names:
        assert (copy / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (("q2",), "--format q2: choose int4, mxfp4, fp8"),
        (("int4", 48), "--group 48: int4 has groups of 32, 64, 128"),
        (("fp8", 32), "--group 32: fp8 has groups of none"),
        (("int4", 0, True), "is no expert's .* quantised already"),
    ],
)
def test_what_cannot_be(tmp_path: Path, settings: Any, problem: str) -> None:
    with pytest.raises(HmcError, match=problem):
        quantize(TINY, tmp_path / "copy", *settings)
    assert not (tmp_path / "copy").exists()


def test_a_directory_that_holds_something_else(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    with pytest.raises(UsageError, match="is not empty"):
        quantize(TINY, tmp_path, "int4")
    with pytest.raises(UsageError, match="is the model itself"):
        quantize(TINY, TINY, "int4")
    copy = tmp_path / "copy"
    quantize(TINY, copy, "fp8")
    with pytest.raises(UsageError, match="made otherwise"):
        quantize(TINY, copy, "int4")
