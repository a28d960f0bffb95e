"""Thoughts are told from answers, however the text is cut."""

from __future__ import annotations

import pytest

from hmc.runtime.tokens.chat import ChatTemplate
from hmc.serve.reasoning import Harmony, Markers, markers_of

THINK = Markers("<think>", "</think>")


def _split(text: str, size: int, *, begun: bool = False) -> tuple[str, str]:
    finder = THINK.finder(begun=begun)
    pieces = [finder.push(text[at : at + size]) for at in range(0, len(text), size)]
    pieces.append(finder.flush())
    return "".join(thought for thought, _ in pieces), "".join(rest for _, rest in pieces)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "begun", "expected"),
    [
        ("<think>\nIt is  so.\n</think>\n\nYes, <b>.", False, ("It is  so.", "Yes, <b>.")),
        (" \n<think></think>Yes", False, ("", "Yes")),
        ("It </thin is.\n\n</think>\nYes\n", True, ("It </thin is.", "Yes\n")),
        ("<think>never ends </thin", False, ("never ends </thin", "")),
        (" <thin air", False, ("", " <thin air")),
        ("Yes <think>no</think>", False, ("", "Yes <think>no</think>")),
        ("<think>a</think>b</think> <think>c", False, ("a", "b</think> <think>c")),
        ("", True, ("", "")),
        ("  ", False, ("", "  ")),
    ],
)
def test_a_thought_and_an_answer(
    text: str, begun: bool, expected: tuple[str, str], size: int
) -> None:
    assert _split(text, size, begun=begun) == expected


def test_a_template_tells_its_markers() -> None:
    def template(source: str) -> ChatTemplate:
        return ChatTemplate(source, {}, "here")

    assert markers_of(template("{{ messages }}")) is None
    assert markers_of(template("<think>\n\n</think>")) == THINK
    assert THINK.begun("<|assistant|><think>\n") and not THINK.begun("<think></think>")


HARMONY_SOURCE = "<|start|>{{ messages }}<|channel|>final<|message|>"
CALLED = "<|channel|>commentary to=functions.ark<|message|>"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "begun", "expected"),
    [
        (
            "<|channel|>analysis<|message|>So, < it.<|end|><|start|>assistant<|channel|>final"
            "<|message|>Yes, <|b.",
            True,
            ("So, < it.", "Yes, <|b."),
        ),
        (
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary"
            ' to=functions.ark <|constrain|>json<|message|>{"a": 1}<|call|>',
            True,
            ("Hm.", CALLED + '{"a": 1}<|call|>'),
        ),
        (
            ' to=functions.ark<|channel|>commentary json<|message|>{"a": 1}<|call|>',
            True,
            ("", CALLED + '{"a": 1}<|call|>'),
        ),
        (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>commentary"
            " to=functions.ark json<|message|>{}",
            True,
            ("", "I look." + CALLED + "{}"),
        ),
        (
            "<|channel|>analysis<|message|>a<|start|>assistant<|channel|>analysis<|message|>b<|en",
            True,
            ("ab<|en", ""),
        ),
        ("Yes.", True, ("", "Yes.")),
        ("<|channel|>anal", True, ("", "")),
        ('{"a": 1}<|end|>', False, ("", '{"a": 1}')),
    ],
)
def test_channels_of_harmony(text: str, begun: bool, expected: tuple[str, str], size: int) -> None:
    harmony = markers_of(ChatTemplate(HARMONY_SOURCE, {}, "here"))
    assert isinstance(harmony, Harmony)
    finder = harmony.finder(begun=begun)
    pieces = [finder.push(text[at : at + size]) for at in range(0, len(text), size)]
    pieces.append(finder.flush())
    thought, rest = ("".join(each) for each in zip(*pieces, strict=True))
    assert (thought, rest) == expected


def test_an_answer_of_harmony_that_is_held_to_a_grammar_has_its_header() -> None:
    harmony = Harmony()
    assert harmony.begun("<|end|><|start|>assistant") and not harmony.begun("assistant")
    assert harmony.closing("") == "<|channel|>final<|message|>" and harmony.closing("a call") == ""
    assert THINK.closing("") == "\n</think>\n\n"
