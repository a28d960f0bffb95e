"""No emoji is seen half, however a stream is cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmc.runtime.tokens.emoji import WholeEmoji

SEQUENCES = [
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",  # a family
    "\U0001f469\U0001f3fd\u200d\U0001f680",  # an astronaut with a tone of skin
    "\U0001f1e9\U0001f1ea",  # a flag
    "\u2764\ufe0f\u200d\U0001f525",  # a heart on fire
    "\U0001f3f4\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f",  # Scotland
    "\U0001f44d\U0001f3ff",
    "\u2600\ufe0f",
]


@pytest.mark.parametrize("sequence", SEQUENCES)
def test_an_emoji_comes_whole(sequence: str) -> None:
    stream = WholeEmoji()
    pieces = [stream.push(character) for character in f"a{sequence}b"]
    assert pieces[0] == "a" and stream.flush() == ""
    assert [piece for piece in pieces[1:] if piece] in ([f"{sequence}b"], [sequence, "b"])
    stream = WholeEmoji()
    cut = "".join(stream.push(character) for character in sequence)
    assert cut + stream.flush() == sequence


def test_flags_beside_each_other() -> None:
    stream, flags = WholeEmoji(), "\U0001f1e9\U0001f1ea\U0001f1eb\U0001f1f7"
    assert [stream.push(each) for each in flags] == ["", flags[:2], "", flags[2:]]


@given(st.lists(st.sampled_from([*SEQUENCES, "a", "1", "#\ufe0f\u20e3", "\u200d", "e\u0301", ""])))
def test_nothing_is_lost_and_text_without_emoji_waits_for_nothing(parts: list[str]) -> None:
    stream = WholeEmoji()
    given_out = [stream.push(character) for part in parts for character in part]
    assert "".join(given_out) + stream.flush() == "".join(parts)
    for part, piece in zip("plain, 12", map(WholeEmoji().push, "plain, 12"), strict=True):
        assert part == piece


def test_an_endless_emoji_does_not_pile_up() -> None:
    stream = WholeEmoji()
    given_out = sum(len(stream.push("\U0001f469\u200d")) for _ in range(500))
    assert given_out >= 1000 - 33
    assert given_out + len(stream.flush()) == 1000
