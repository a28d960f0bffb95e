"""What a shell offers after `hmc run <Tab>`: plans, machines, families and kernels, by what an
argument is called; all else is click's. Only loaded while a shell asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class, shell_complete

from hmc.errors import HmcError

VARIABLE = "_HMC_COMPLETE"
"""Set by the shell's script while it asks."""

Offer = Callable[[click.Context, str], Iterable[CompletionItem]]


def script(shell: str) -> str:
    """What a shell has to run to complete `hmc`: bash, zsh or fish."""
    found = get_completion_class(shell)
    assert found is not None
    return found(click.Group(), {}, "hmc", VARIABLE).source()


def answer(group: click.Group) -> int:
    """Print what a shell asked for by the environment; the exit code."""
    return shell_complete(group, {}, "hmc", VARIABLE, os.environ[VARIABLE])


def prepare(command: click.Command) -> None:
    """Let the arguments of a command offer what they take."""
    for parameter in command.params:
        if (offer := OFFERS.get(parameter.name or "")) is not None:
            parameter.type = _Offered(offer)
    if isinstance(command, click.Group):
        for each in command.commands.values():
            prepare(each)


class _Offered(click.ParamType):  # type: ignore[type-arg]
    """Any text, with offers."""

    name = "text"

    def __init__(self, offer: Offer) -> None:
        self._offer = offer

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return list(self._offer(ctx, incomplete))


def _entries(incomplete: str, *endings: str) -> list[CompletionItem]:
    """Files of some endings, and the folders on the way to others; no hidden ones."""
    folder, slash, begun = incomplete.rpartition("/")
    place = Path(folder + slash or ".").expanduser()
    try:
        found = sorted(place.iterdir())
    except OSError:
        return []
    named = [each for each in found if each.name.startswith(begun) and each.name[0] != "."]
    return [
        CompletionItem(f"{folder}{slash}{each.name}{'/' if each.is_dir() else ''}")
        for each in named
        if each.is_dir() or each.name.endswith(endings)
    ]


def _plans(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    return _entries(incomplete, ".hmp")


def _models(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    return _entries(incomplete, ".gguf")


def _runnable(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    return _entries(incomplete, ".hmp", ".gguf")


def _targets(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    plans = _entries(incomplete, ".hmp")
    return [*plans, *(each for each in _entries(incomplete, ".json") if each.value[-1] != "/")]


def _machines(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    from hmc.machine.detect import named_machines

    return [*_words(("auto", *named_machines()), incomplete), *_entries(incomplete, ".json")]


def _families(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    from hmc.models import all_families

    return _words(sorted(all_families()), incomplete)


def _folders(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(incomplete, type="dir")]


def _kernels(ctx: click.Context, incomplete: str) -> list[CompletionItem]:
    """Those of the plan on the line; none where it cannot be read: a shell has no place for why."""
    from hmc.plan import load_plan

    # click leaves the words where the last one is an option without its value
    path = ctx.params.get("plan_path") or next(iter(ctx.args), "")
    try:
        plan = load_plan(path)
    except HmcError:
        return []
    return _words(sorted(plan.kernels), incomplete)


def _words(words: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


OFFERS: dict[str, Offer] = {
    "plan_path": _runnable,
    "plan_paths": _runnable,
    "first": _plans,
    "second": _plans,
    "target": _targets,
    "model": _models,
    "machine": _machines,
    "family": _families,
    "checkpoint": _folders,
    "ir": _kernels,
    "asm": _kernels,
}
"""By the names of parameters, over all commands."""
