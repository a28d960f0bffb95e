"""What begins with a slash: commands about the conversation, one row each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hmc.cli.chat.session import Message, Session
from hmc.cli.chat.settings import KINDS, changed, shown
from hmc.errors import UsageError
from hmc.files import write_file

_ROLES = ("system", "user", "assistant")


class Quit(Exception):
    """`/quit`."""


@dataclass(frozen=True)
class Command:
    """`run(session, argument)`; `argument` is how the rest of the line is shown in `/help`."""

    name: str
    argument: str
    what: str
    run: Callable[[Session, str], None]


def run(session: Session, line: str) -> None:
    """Do what a line that begins with a slash says; `UsageError` for what cannot be done, `Quit`
    for the end.
    """
    name, _, argument = line.partition(" ")
    found = next((command for command in COMMANDS if command.name == name), None)
    if found is None:
        raise UsageError(
            f"no command {name.split()[0]}: /help lists them; a blank before it says it to the"
            " model"
        )
    found.run(session, argument.strip())


def complete(line: str) -> Sequence[str]:
    """What the last word of a line may be: a command, a setting or a file."""
    name, blank, argument = line.partition(" ")
    if not blank:
        return [f"{c.name} " for c in COMMANDS if name and c.name.startswith(name)]
    if name == "/set" and " " not in argument:
        return [f"{setting} " for setting in KINDS if setting.startswith(argument)]
    if name in ("/save", "/load"):
        return _files(argument)
    return []


def _files(begun: str) -> list[str]:
    folder, _, name = begun.rpartition("/")
    place = Path(folder or ("/" if begun.startswith("/") else "."))
    if not place.is_dir():
        return []
    before = begun[: len(begun) - len(name)]
    found = sorted(entry for entry in place.iterdir() if entry.name.startswith(name))
    return [f"{before}{entry.name}{'/' if entry.is_dir() else ' '}" for entry in found]


def _help(session: Session, argument: str) -> None:
    rows = [(f"{command.name} {command.argument}".strip(), command.what) for command in COMMANDS]
    rows += [
        ("text \\", "a message goes on in the next line"),
        ('"""', 'a message of several lines, up to the next """'),
        ("Ctrl-C", "ends an answer; twice at an empty prompt, or Ctrl-D: the end"),
    ]
    session.screen.say("\n".join(f"{left:<20} {right}" for left, right in rows))


def _system(session: Session, argument: str) -> None:
    if argument:
        session.begin_with("" if argument == "-" else argument)
    session.screen.note(f"system: {session.system or 'none'}")


def _save(session: Session, argument: str) -> None:
    path = _path("/save", argument)
    text = json.dumps({"messages": session.whole}, ensure_ascii=False) + "\n"
    write_file(path, text, "the conversation", UsageError)
    session.screen.note(f"{len(session.whole)} messages in {path}")


def _load(session: Session, argument: str) -> None:
    path = _path("/load", argument)
    session.start_with(_read(path))
    session.screen.note(f"{len(session.whole)} messages of {path}")


def _read(path: Path) -> list[Message]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"/load {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"/load {path}: not JSON: {error}") from error
    messages = found.get("messages") if isinstance(found, dict) else None
    if not isinstance(messages, list):
        raise UsageError(f'/load {path}: no object with "messages"')
    for at, each in enumerate(messages):
        fields = each if isinstance(each, dict) else {}
        known = fields.get("role") in _ROLES and isinstance(fields.get("content"), str)
        if not known or (fields["role"] == "system" and at):
            raise UsageError(
                f"/load {path}: message {at + 1} is none: a role (system: the first one alone,"
                " user, assistant) and a text as content"
            )
    return messages


def _path(command: str, argument: str) -> Path:
    if not argument:
        raise UsageError(f"{command}: name a file")
    return Path(argument).expanduser()


def _retry(session: Session, argument: str) -> None:
    session.retry()


def _set(session: Session, argument: str) -> None:
    if not argument:
        session.screen.say(shown(session.options))
        return
    session.draw_by(changed(session.options, argument))


def _stats(session: Session, argument: str) -> None:
    say = session.screen.say
    if not session.turns:
        say("no answer yet")
    for number, turn in enumerate(session.turns, start=1):
        times = turn.times
        pace = turn.computed / times.ttft_s if times.ttft_s > 0 else 0.0
        say(
            f"{number}: prompt {times.prompt_tokens} tokens, {turn.computed} computed at"
            f" {pace:.1f} tok/s, first token after {times.ttft_s:.2f} s; {times.new_tokens} tokens"
            f" at {times.decode_tokens_per_second:.1f} tok/s, {turn.reason}"
        )
    left = f", {session.left_out} messages left out" if session.left_out else ""
    say(f"context: {session.held} of {session.context} tokens{left}")


def _clear(session: Session, argument: str) -> None:
    session.start_with([])
    session.screen.note("a new conversation")


def _quit(session: Session, argument: str) -> None:
    raise Quit


COMMANDS = (
    Command("/help", "", "this list", _help),
    Command("/system", "[TEXT]", "show or change the system message; -: none", _system),
    Command("/save", "FILE", "write the conversation, as --prompts reads it", _save),
    Command("/load", "FILE", "go on with one that was saved", _load),
    Command("/retry", "", "answer once more", _retry),
    Command("/set", "[NAME [VALUE]]", "show, change or give up a setting of sampling", _set),
    Command("/stats", "", "tokens a second of each answer, and the context", _stats),
    Command("/clear", "", "begin a new conversation", _clear),
    Command("/quit", "", "the end", _quit),
)
