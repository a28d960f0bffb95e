"""What a shell is told: its script, and words by what an argument is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import hmc
from hmc import cli
from hmc.plan import load_plan

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny-kjv"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion")
    hmc.save_plan(hmc.compile(EXAMPLE), path / "tiny.hmp")
    (path / "small").mkdir()
    for name in ("box.json", "small.gguf", "notes.txt", ".hidden.hmp"):
        (path / name).touch()
    return path


@pytest.fixture
def offered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> object:
    """`offered(words..., begun)`: what the last word may be."""
    monkeypatch.chdir(folder)

    def get(*words: str) -> list[str]:
        monkeypatch.setenv("_HMC_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", " ".join(["hmc", *words]))
        monkeypatch.setenv("COMP_CWORD", str(len(words)))
        with pytest.raises(SystemExit) as ended:
            cli.main([])
        assert ended.value.code == 0
        return [line.partition(",")[2] for line in capsys.readouterr().out.split()]

    return get


def test_words(offered, folder: Path) -> None:  # type: ignore[no-untyped-def]
    assert offered("s") == ["show", "serve", "simulate"]
    assert offered("--v") == ["--version"]
    assert offered("run", "--max") == ["--max-new-tokens"]
    assert offered("run", "t") == ["tiny.hmp"]
    assert offered("run", "") == offered("serve", "") == ["small/", "small.gguf", "tiny.hmp"]
    assert offered("run", str(folder / "ti")) == [str(folder / "tiny.hmp")]
    assert offered("run", "nowhere/") == []
    assert offered("compile", "s") == ["small/", "small.gguf"]
    assert offered("simulate", "") == ["small/", "tiny.hmp", "box.json"]
    assert offered("diff", "tiny.hmp", "t") == ["tiny.hmp"]
    assert offered("simulate", "x", "--machine", "desktop") == [
        "desktop-rtx3090",
        "desktop-rtx4090",
    ]
    assert offered("bench", "predict", "x", "--machine", "b") == ["box.json"]
    assert "deepseek_v3" in offered("compile", "--family", "deep")
    kernels = sorted(load_plan("tiny.hmp").kernels)
    assert offered("show", "tiny.hmp", "--ir", kernels[0][:3])[0] == kernels[0]
    assert offered("show", "notes.txt", "--asm", "e") == []
    assert offered("completion", "") == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts(shell: str) -> None:
    command = [sys.executable, "-m", "hmc", "completion", shell]
    script = subprocess.check_output(command, text=True)
    assert f"{shell}_complete" in script
    if path := shutil.which(shell):
        subprocess.run([path, "-n"], input=script, text=True, check=True)
