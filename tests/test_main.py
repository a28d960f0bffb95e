"""What the command line makes of errors, and what `env` keeps of the process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import pytest

from hmc import cli, env
from hmc.compiler import compile as compile_plan
from hmc.errors import ExecutionError, PlanError
from hmc.plan import save_plan


def test_a_pipe_of_ours_that_breaks_is_an_error_and_not_a_closed_stdout(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    @click.command()
    def command() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.write(writer, b"hello")

    monkeypatch.setattr(cli.cli, "get_command", lambda *_: command)
    with pytest.raises(SystemExit) as ended:
        cli.main(["show"])
    assert ended.value.code == 6
    said = capfd.readouterr().err
    assert said.startswith("hmc: error: a process or a socket that hmc writes to is gone")
    assert said.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--help"], ["show", "nowhere.hmp"]])
def test_a_reader_that_is_gone_ends_it_in_silence(arguments: list[str]) -> None:
    """Also when all there is to say is said at the end: help on stdout, an error on stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "hmc", *arguments]
    silent = arguments == ["--help"]
    with open(writer, "wb") as gone:
        streams = {"stdout": gone, "stderr": subprocess.PIPE if silent else gone}
        done = subprocess.run(command, check=False, **streams)  # type: ignore[call-overload]
    assert done.returncode == 141 and not done.stderr


def test_a_full_disk_is_one_line_and_stderr_changes_no_exit_code() -> None:
    command = [sys.executable, "-m", "hmc"]
    with open("/dev/full", "w") as full:
        shown = subprocess.run(
            [*command, "--help"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
        refused = subprocess.run([*command, "show", "nowhere.hmp"], stderr=full, check=False)
    assert shown.returncode == ExecutionError.exit_code
    assert shown.stderr.startswith("hmc: error: what hmc writes finds no room: ")
    assert shown.stderr.count("\n") == 1
    assert refused.returncode == PlanError.exit_code


def test_the_package_alone_loads_nothing() -> None:
    """Nor do the processes that compile kernels load what plans are checked with."""
    script = "import sys, hmc.codegen.build; print({'pydantic', 'torch'} & sys.modules.keys())"
    assert subprocess.check_output([sys.executable, "-c", script], text=True) == "set()\n"


@pytest.mark.parametrize("more", [[], pytest.param(["--dummy-weights"], marks=pytest.mark.slow)])
def test_a_plan_for_cpus_runs_without_torch(tmp_path: Path, more: list[str]) -> None:
    example = Path(__file__).parents[1] / "examples" / "tiny-kjv"
    save_plan(compile_plan(example), tmp_path / "tiny.hmp")
    script = (
        "import sys\nfrom hmc.cli import main\ntry:\n    main(sys.argv[1:])\n"
        "finally:\n    assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    arguments = ["run", str(tmp_path / "tiny.hmp"), "-p", "In the beginning", "-n", "4"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments, *more], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "decode x 3" in done.stderr


def test_the_collector_is_off_until_the_last_thread_is_through() -> None:
    def nested() -> None:
        for _ in range(2000):
            with env.uncollected(), env.uncollected():
                assert not gc.isenabled()

    assert gc.isenabled()
    with ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(nested) for _ in range(4)]:
            future.result()
    assert gc.isenabled()
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with env.uncollected():
            inside.set()
            go_on.wait(20)

    thread = threading.Thread(target=hold)
    with env.uncollected():
        thread.start()
        assert inside.wait(20)
    assert not gc.isenabled()
    go_on.set()
    thread.join(20)
    assert gc.isenabled()


def test_a_death_by_a_signal_leaves_a_line() -> None:
    dies = "import os, hmc.cli as c; c._run = lambda _: os.kill(os.getpid(), 11); c.main([])"
    ended = subprocess.run(
        [sys.executable, "-c", dies], capture_output=True, text=True, check=False
    )
    assert ended.returncode == -11
    assert ended.stderr.startswith("Fatal Python error: Segmentation fault")
