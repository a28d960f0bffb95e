"""A conversation without a terminal: commands, what is kept, what is left out, and pipes."""

from __future__ import annotations

import io
import json
import os
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hmc
from hmc.cli.chat import commands, loop
from hmc.cli.chat.history import MOST, History
from hmc.cli.chat.messages import message
from hmc.cli.chat.screen import Screen
from hmc.cli.chat.session import Session
from hmc.errors import UsageError

GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 16}


@pytest.fixture
def session(engine: hmc.Engine) -> Iterator[Session]:
    assert engine.text is not None
    with Session(engine, engine.text, Screen(), GREEDY) as found:
        yield found
    assert engine.executor.kv.allocator.used == 0


Say = Callable[[str], tuple[str, str]]


@pytest.fixture
def say(session: Session, capsys: pytest.CaptureFixture[str]) -> Say:
    """A line to the session; what came on stdout and on stderr."""

    def said(line: str) -> tuple[str, str]:
        commands.run(session, line) if line.startswith("/") else session.ask(line)
        found = capsys.readouterr()
        return found.out, found.err

    return said


def test_a_turn_computes_what_is_new_and_answers_as_without_a_cache(
    session: Session, say: Say, engine: hmc.Engine
) -> None:
    for line in ("Who is he", "And then?", "Why?"):
        out, _ = say(line)
        prompt = session.messages[:-1]
        alone = engine.generate(prompt, **GREEDY)
        assert out == alone.text + "\n" == session.messages[-1]["content"] + "\n"
    first, *later = session.turns
    assert first.cached == 0 and first.computed == first.times.prompt_tokens
    assert [turn.computed for turn in later] == [
        turn.times.prompt_tokens - before.times.prompt_tokens - before.times.new_tokens + 1
        for before, turn in zip(session.turns, later, strict=False)
    ]
    out, _ = say("/stats")
    assert out.count(" tok/s") == 6 and f"{later[-1].computed} computed" in out
    assert f"context: {session.held} of 256 tokens" in out


def test_retry_and_clear(session: Session, say: Say) -> None:
    first, _ = say("Who is he")
    say("/set temperature 1.5")
    say("/set seed 3")
    again, _ = say("/retry")
    assert again != first and session.turns[-1].computed == 1
    assert [each["role"] for each in session.messages] == ["user", "assistant"]
    say("/clear")
    with pytest.raises(UsageError, match="nothing has been said"):
        say("/retry")
    say("/set temperature 0")
    assert say("Who is he")[0] == first


def test_a_full_context_leaves_the_oldest_turns_out(session: Session, say: Say) -> None:
    say("/set max_new_tokens")
    say("Tell me all about the king of Judah")
    left = ""
    while not left:
        _, left = say("and tell me more of him, and of his sons, and of all that they did")
    assert "oldest messages are no longer shown to the model" in left
    assert 0 < session.left_out < len(session.messages) - 1
    assert session.turns[-1].times.prompt_tokens <= 128
    assert f"{session.left_out} messages left out" in say("/stats")[0]
    before = list(session.messages)
    with pytest.raises(UsageError, match="the plan's context holds 256"):
        say("word " * 300)
    assert session.messages == before


def test_thoughts_are_set_apart_and_the_templates_business(session: Session, say: Say) -> None:
    say("/set thinking on")
    out, err = say("Who is he")
    thought = session.messages[-1]["reasoning_content"]
    assert out == "\n" and thought and err.startswith(thought)
    say("/set thinking")
    say("And then?")
    assert session.turns[-1].cached < session.turns[0].times.prompt_tokens  # it is not sent back


def test_settings(session: Session, say: Say) -> None:
    say("/set top_k 5")
    assert session.options["top_k"] == 5 and "top_k                5" in say("/set")[0]
    say("/set top_k")
    assert "top_k" not in session.options
    before = dict(session.options)
    for line, part in (
        ("/set colour red", "no setting 'colour'"),
        ("/set top_p much", "not a value"),
        ("/set top_p 7", "top_p"),
        ("/set thinking maybe", "not a value"),
        ("/nothing", "no command /nothing"),
        ("/save", "name a file"),
    ):
        with pytest.raises(UsageError, match=part):
            say(line)
    assert session.options == before


def test_what_is_saved_is_loaded(session: Session, say: Say, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    say("/system Be brief")
    first, _ = say("Who is he")
    say(f"/save {path}")
    (line,) = path.read_text().splitlines()
    assert [each["role"] for each in json.loads(line)["messages"]] == [
        "system",
        "user",
        "assistant",
    ]
    say("/clear")
    say("/system -")
    assert session.whole == []
    say(f"/load {path}")
    assert session.whole == json.loads(line)["messages"] and session.system == "Be brief"
    assert say("/retry")[0] == first
    for text, part in (
        ("{", "not JSON"),
        ("[]", 'no object with "messages"'),
        ('{"messages": [{"role": "user"}]}', "message 1"),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "a"}]}',
            "2",
        ),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=part):
            say(f"/load {path}")
    with pytest.raises(UsageError, match="No such file"):
        say(f"/load {tmp_path / 'none'}")
    with pytest.raises(UsageError, match="cannot write"):
        say(f"/save {tmp_path / 'none' / 'x'}")
    assert session.system == "Be brief" and len(session.messages) == 2


def test_ctrl_c_ends_an_answer_and_keeps_what_was_said(
    session: Session, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def decode(*arguments: Any, plain: Any = session._engine.executor.decode) -> Any:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(session._engine.executor, "decode", decode)
    say("Who is he")
    assert signal.getsignal(signal.SIGINT) is before
    assert session.turns[-1].reason == "cancelled" and session.turns[-1].times.new_tokens == 4
    held = session.held
    say("And then?")
    assert session.turns[-1].cached >= held - 1


def test_ctrl_c_before_the_first_token_takes_the_message_back(
    session: Session, say: Say, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chunk(*arguments: Any, plain: Any = session._engine.executor.chunk, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments, **more)

    monkeypatch.setattr(session._engine.executor, "chunk", chunk)
    assert "nothing was answered" in say("Who is he")[1]
    assert session.messages == []


def test_completion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "talk.json").touch()
    (tmp_path / "talks").mkdir()
    monkeypatch.chdir(tmp_path)
    assert commands.complete("/s") == ["/system ", "/save ", "/set ", "/stats "]
    assert commands.complete("/set top") == ["top_k ", "top_p "]
    assert commands.complete("/load ta") == ["talk.json ", "talks/"]
    assert commands.complete(f"/load {tmp_path}/talk.") == [f"{tmp_path}/talk.json "]
    assert commands.complete("/load nowhere/x") == commands.complete("s") == []


def lines(*texts: str) -> Callable[[str], str]:
    left = iter(texts)

    def line(prompt: str) -> str:
        found = next(left, None)
        if found is None:
            raise EOFError
        return found

    return line


def test_messages_of_several_lines() -> None:
    assert message(lines("one")) == "one"
    assert message(lines("one\\", "two\\", "three")) == "one\ntwo\nthree"
    assert message(lines('"""', "one \\", "", "two", '"""')) == "one \\\n\ntwo"
    assert message(lines('"""one"""')) == "one"
    for cut in (lines("one\\"), lines('"""one', "two")):
        with pytest.raises(UsageError, match="ends within a message"):
            message(cut)
    with pytest.raises(EOFError):
        message(lines())


def test_the_history_has_messages_whole_and_is_private(tmp_path: Path) -> None:
    path = tmp_path / "state" / "chat-history"
    history = History(path)
    assert history.read() == []
    for number in range(2 * MOST + 1):
        history.add(f"line {number}\nof two")
    with path.open("a") as file:
        file.write("no JSON\n")
    assert history.read()[-1] == f"line {2 * MOST}\nof two"
    assert len(path.read_text().splitlines()) == len(history.read()) == MOST
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def piped(engine: hmc.Engine, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    assert engine.text is not None
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    loop.talk(engine, engine.text, GREEDY)


def test_through_pipes_a_line_is_a_message(
    engine: hmc.Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(engine, monkeypatch, 'Who is he\n\n"""\nAnd\nthen?"""\n/quit\nWhy?\n')
    out = capsys.readouterr().out
    assert out.count("\n") == 2 + out.strip().count("\n") - 1 and "\x1b" not in out
    first = engine.generate([{"role": "user", "content": "Who is he"}], **GREEDY).text
    assert out.startswith(first)
    with pytest.raises(UsageError, match="no command"):
        piped(engine, monkeypatch, "/nothing\nWho is he\n")
    assert capsys.readouterr().out == ""
