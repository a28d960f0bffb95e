"""The command line: `hmc compile | run | show | serve | bench | simulate | doctor | ...`; maps
every error to one line and an exit code.

Subcommands are imported when they are called, so that `hmc --help` and `hmc show` never load torch.
"""

from __future__ import annotations

import errno
import faulthandler
import importlib
import os
import select
import shlex
import sys
from typing import NoReturn, TextIO

import click
from click.shell_completion import CompletionItem

from hmc import env
from hmc.errors import ExecutionError, HmcError
from hmc.version import VERSION

_COMMANDS = {
    "compile": "Compile a model directory, a GGUF file or a hub id into a plan.",
    "fetch": "Fetch the weights of a plan that was made from a hub id.",
    "run": "Write tokens from a plan or a model.",
    "models": "List the model families hmc reads.",
    "show": "Show what a plan holds, and why.",
    "serve": "Serve plans or models over HTTP to OpenAI's and Anthropic's clients.",
    "bench": "Measure a plan, a model shape, or single kernels.",
    "simulate": "Predict what a plan or a model will do on a machine.",
    "doctor": "Show what hmc finds on this machine and what it will use.",
    "diff": "Show what two plans differ in.",
    "report": "Write one HTML page about a plan.",
    "probe": "Measure this machine and write it as a machine file.",
    "quantize": "Write a lossy copy of a model in few bits.",
    "tune": "Change a plan by hand, or by search on this machine.",
    "completion": "Print the script that completes hmc in a shell.",
}

_COMPLETE = "_HMC_COMPLETE"
"""In the environment while a shell asks how a line may go on."""

_STANDARD = (1, 2)
"""Descriptors of standard output and error."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Lazy(click.Group):
    """Knows names and one-line helps; loads a command's module on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        # Nobody extends hmc's models by plugins, and looking for some takes 20 ms.
        os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "1")
        with env.uncollected():
            home = "bench" if cmd_name == "bench" else f"{cmd_name}_command"
            command = importlib.import_module(f"hmc.cli.{home}").command
        assert isinstance(command, click.Command)
        if _COMPLETE in os.environ:
            importlib.import_module("hmc.cli.completion").prepare(command)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """click's own would load every command for its help."""
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        commands = _COMMANDS.items()
        return [
            CompletionItem(name, help=line)
            for name, line in commands
            if name.startswith(incomplete)
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(VERSION, prog_name="hmc")
def cli() -> None:
    """Compile a Mixture-of-Experts checkpoint into an execution plan for this machine, and run it.

    \b
    hmc compile model/ -o plan.hmp    (or org/name of the hub)
    hmc show plan.hmp
    hmc run plan.hmp -p "Once upon a time"
    """


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit; an `HmcError` ends in one line on stderr and its exit code,
    a reader of stdout or stderr that is gone in 141, as a shell has it for SIGPIPE. What stderr has
    no room for is lost without changing the exit code.
    """
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        faulthandler.enable(sys.__stderr__)  # a death by a signal leaves more than an exit code
    try:
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        for descriptor in filter(_unread, _STANDARD):  # where Python flushes once more at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        code = 141
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        failure = ExecutionError(f"what hmc writes finds no room: {error}")
        code = failure.exit_code
        _tell(f"error: {failure}")
    for stream, descriptor in zip((sys.stdout, sys.stderr), _STANDARD, strict=True):
        _give_up(stream, descriptor)
    sys.exit(code)


def _tell(text: str) -> None:
    """A line on stderr, where that has room for it."""
    try:
        click.echo(f"hmc: {text}", err=True)
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise


def _give_up(stream: TextIO | None, descriptor: int) -> None:
    """Lose what a standard stream cannot write, which Python would try once more at its end."""
    try:
        if stream is not None:
            stream.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _run(arguments: list[str] | None) -> int:
    """The exit code of a command, whose error has been told; `BrokenPipeError` is raised when it
    is stdout or stderr that nobody reads.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if _COMPLETE in os.environ:
        return int(importlib.import_module("hmc.cli.completion").answer(cli))
    try:
        # Not `cli.main`, which takes every broken pipe for a closed stdout.
        with cli.make_context("hmc", given, obj=shlex.join(["hmc", *given])) as context:
            code = cli.invoke(context)
        return code if isinstance(code, int) else 0
    except HmcError as error:
        failure = error
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        _tell(f"error: {error.format_message()}")
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        _tell("cancelled")
        return 130
    except BrokenPipeError as error:
        if any(map(_unread, _STANDARD)):
            raise
        failure = ExecutionError(f"a process or a socket that hmc writes to is gone: {error}")
    _tell(f"error: {failure}")
    return failure.exit_code


def _unread(descriptor: int) -> bool:
    """Whether a descriptor is a pipe or a socket that nobody reads any more."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
