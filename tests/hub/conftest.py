"""A played hub that the library believes to be the hub, with a cache of its own and no waits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_commands import EXAMPLE, Run
from huggingface_hub import constants
from played_hub import PlayedHub, believe, playing

from hmc.cli import main


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where commands read and write; compiled kernels are those of the session."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[PlayedHub]:
    with playing() as found:
        believe(found.url, monkeypatch)
        yield found


@pytest.fixture
def king(hub: PlayedHub) -> PlayedHub:
    """With the example model as king/tiny-kjv."""
    hub.add("king/tiny-kjv", EXAMPLE)
    return hub


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: (exit code, standard output, standard error) of the command line."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), out, err

    return call
