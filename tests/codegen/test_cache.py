"""Compiled kernels on disk: damage is noticed, and neither it nor a folder that cannot be used
keeps anybody from kernels; children that build leave nothing behind.
"""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hmc.codegen import build, cache
from hmc.codegen.isa import best_isa
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError


def specs(count: int) -> list[KernelSpec]:
    """Small kernels."""
    return [KernelSpec.of("gather_rows", best_isa().name, width=8 + at) for at in range(count)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("HMC_CACHE", str(tmp_path))
    cache._say_once.cache_clear()
    return tmp_path / "kernels"


def damaged(data: bytes) -> list[bytes]:
    """What a crash or a bad disk may leave of a file, and what older versions wrote."""
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    return [b"", data[: len(data) // 2], bytes(len(data)), bytes(flipped), data.split(b"\n", 1)[1]]


def test_a_damaged_object_is_built_anew() -> None:
    (spec,) = specs(1)
    code = Jit(EMITTERS).object_code(spec)
    path = cache.path_of(spec)
    whole = path.read_bytes()
    for data in damaged(whole):
        path.write_bytes(data)
        assert Jit(EMITTERS).object_code(spec) == code
        assert path.read_bytes() == whole


def test_processes_share_a_cold_cache(folder: Path) -> None:
    text = pickle.dumps(specs(3))
    children = [subprocess.Popen(build._COMMAND, stdin=subprocess.PIPE) for _ in range(2)]
    for child in children:
        assert child.stdin is not None
        child.stdin.write(text)
        child.stdin.close()
    assert [child.wait() for child in children] == [0, 0]
    assert {path.name for path in folder.iterdir()} == {cache.path_of(s).name for s in specs(3)}


_KEYS = """
from hmc.codegen import cache
from hmc.codegen.isa import best_isa
from hmc.formats import FORMATS
print([cache._key(best_isa(), row) for row in (None, *FORMATS.values())])
"""


def test_a_format_has_the_same_key_in_every_process() -> None:
    """A row's functions have other addresses in each."""
    command, keys = [sys.executable, "-c", _KEYS], []
    for seed in "12":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        keys.append(subprocess.check_output(command, env=environment, text=True))
    assert keys[0] == keys[1]


@pytest.mark.parametrize("way", ["no folder", "full"])
def test_without_a_cache_kernels_are_built_and_it_is_said_once(
    way: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if way == "no folder":
        (folder.parent / "file").write_text("in the way")
        monkeypatch.setenv("HMC_CACHE", str(folder.parent / "file"))
    else:

        def write(path: Path, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(cache, "write_beside", write)
    jit = Jit(EMITTERS)
    for spec in specs(2):
        assert jit.object_code(spec).startswith(b"\x7fELF")
    (line,) = capfd.readouterr().err.splitlines()
    assert "cannot be used" in line and "HMC_CACHE" in line


def test_no_children_where_nothing_can_be_kept(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (folder.parent / "file").write_text("in the way")
    monkeypatch.setenv("HMC_CACHE", str(folder.parent / "file"))
    monkeypatch.setattr(build, "_COMMAND", ["/does/not/exist"])
    build.build(specs(8))
    assert "HMC_CACHE" in capfd.readouterr().err


def test_what_a_dead_process_left_is_removed(folder: Path) -> None:
    folder.mkdir()
    old, young = folder / ".a.o.x1", folder / ".b.o.x2"
    for path in (old, young):
        path.write_bytes(b"half")
    an_age_ago = time.time() - 2 * cache._STALE_S
    os.utime(old, (an_age_ago, an_age_ago))
    Jit(EMITTERS).object_code(specs(1)[0])
    assert young.exists() and not old.exists()


class Started:
    """Children that `build` starts, running `script`; the start number `fails_at` fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, script: str, fails_at: int = -1) -> None:
        self.children: list[subprocess.Popen[bytes]] = []
        self._popen, self._fails_at = subprocess.Popen, fails_at
        monkeypatch.setattr(build, "_COMMAND", [sys.executable, "-c", script])
        monkeypatch.setattr(subprocess, "Popen", self._start)
        monkeypatch.setenv("HMC_THREADS", "2")

    def _start(self, *args: Any, **named: Any) -> subprocess.Popen[bytes]:
        if len(self.children) == self._fails_at:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.children.append(self._popen(*args, **named))
        return self.children[-1]

    def are_reaped(self) -> bool:
        """Whether all have ended and been waited for."""
        return all(child.returncode is not None for child in self.children)


def test_the_first_child_ends_when_the_second_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = Started(monkeypatch, "import time; time.sleep(600)", fails_at=1)
    with pytest.raises(KernelError, match="no process starts"):
        build.build(specs(4))
    assert len(started.children) == 1 and started.are_reaped()


def test_a_child_may_say_more_than_a_pipe_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys; sys.stderr.write('x' * 300_000 + '\\nthe reason'); sys.exit(1)"
    started = Started(monkeypatch, script)
    with pytest.raises(KernelError, match=r"failed: the reason$"):
        build.build(specs(4))
    assert len(started.children) == 2 and started.are_reaped()


def test_children_have_a_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Started(monkeypatch, "import time; time.sleep(600)")
    monkeypatch.setattr(build, "_PATIENCE_S", 0.0)
    with pytest.raises(KernelError, match="too long"):
        build.build(specs(4))
    assert started.are_reaped()
