"""Thoughts are told from answers, however the text is cut."""

from __future__ import annotations

import pytest

from hmc.runtime.tokens.chat import ChatTemplate
from hmc.serve.reasoning import Markers, ThoughtFinder, markers_of

THINK = Markers("<think>", "</think>")


def _split(text: str, size: int, *, begun: bool = False) -> tuple[str, str]:
    finder = ThoughtFinder(THINK, begun=begun)
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
