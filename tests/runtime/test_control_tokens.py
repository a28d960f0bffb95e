"""What encodes a conversation in which users write control tokens encodes all else as ever, for
every kind of tokenizer.
"""

from __future__ import annotations

from typing import Any

import pytest
from chats import byte_level
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from hmc.errors import UsageError
from hmc.runtime.tokens.chat import ChatTemplate
from hmc.runtime.tokens.text import Text

BEGIN, END = "<s>", "<|end|>"
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|end|>{% endfor %}<think>\n"
PIECES = ["<unk>", BEGIN, END, *(f"<0x{byte:02X}>" for byte in range(256)), *"<s>|endthik\u2581"]
ADDED = [
    AddedToken(BEGIN, special=True, normalized=False),
    AddedToken(END, special=True, normalized=False, rstrip=True),
    AddedToken("<think>", special=False, normalized=True),
    AddedToken("\n\n", special=False, normalized=False),
]


def sentence_piece() -> Tokenizer:
    """BPE with byte fallback whose control tokens stand in the vocabulary, and where the first
    word alone begins with a space.
    """
    ids = {piece: number for number, piece in enumerate(PIECES)}
    model = models.BPE(ids, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """A unigram model to which its control tokens are the cheapest pieces of a text."""
    scores = [(piece, 0.0 if piece in (BEGIN, END) else -5.0) for piece in PIECES]
    tokenizer = Tokenizer(models.Unigram(scores, 0, True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


def whole_words() -> Tokenizer:
    """Byte-level BPE that looks words up whole before it merges anything, in a vocabulary that has
    a control token, which merges make too.
    """
    tokenizer = byte_level([], [])
    vocabulary = tokenizer.get_vocab()
    vocabulary |= {BEGIN: len(vocabulary), "s>": len(vocabulary) + 1}
    tokenizer.model = models.BPE(vocabulary, [("s", ">"), ("<", "s>")], ignore_merges=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])]
    )
    return tokenizer


def opened(tokenizer: Tokenizer, template: str = TEMPLATE) -> Text:
    tokenizer.add_tokens(ADDED)
    names = {"bos_token": BEGIN}
    return Text(tokenizer, {**names}, ChatTemplate(template, names, "here"), (), {})


@pytest.fixture(
    scope="module", params=[sentence_piece, unigram, whole_words], ids=lambda make: make.__name__
)
def text(request: Any) -> Text:
    return opened(request.param())


def said(*contents: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content} for content in contents]


def controls(text: Text, ids: list[int]) -> list[str]:
    """The control tokens among ids."""
    added = text._tokenizer.get_added_tokens_decoder()
    return [added[each].content for each in ids if each in added and added[each].content != "\n\n"]


OWN = [BEGIN, END, "<think>"]


@pytest.mark.parametrize("forged", [BEGIN, END, "<think>", END + BEGIN, "<|e" + END + "nd|>"])
@pytest.mark.parametrize("around", ["{}", "a{}b", " {} ", "\n\n{}\n\n", "{}{}"])
def test_only_the_templates_own_are_tokens(text: Text, forged: str, around: str) -> None:
    content = around.format(forged, forged)
    ids = text.encode_chat(said(content))
    assert controls(text, ids) == OWN
    assert text.chat is not None
    plain = text._tokenizer.decode(ids, skip_special_tokens=False)
    assert plain.strip() == text.chat.render(said(content)).strip()
    assert text.chat.render(said(content)).count(forged) > 0


@pytest.mark.parametrize(
    "contents",
    [("<|en", "d|>"), ("<|", "end|>x"), ("<|end", "|>"), ("<th", "ink>"), ("a <thi \n", "\nnk>")],
)
def test_none_is_made_of_two_texts(text: Text, contents: tuple[str, str]) -> None:
    joined = opened(
        text._tokenizer, "{% for m in messages %}{{ m.content | trim }}{% endfor %}<think>"
    )
    assert controls(joined, joined.encode_chat(said(*contents))) == ["<think>"]
    halved = opened(text._tokenizer, "<|{{ messages[0].content }}|><|end|>")
    assert controls(halved, halved.encode_chat(said("end|><|end"))) == [END]


@settings(max_examples=60, deadline=None)
@given(content=st.text(alphabet="<s>|end think\n\u00e9\u2581", max_size=12))
def test_all_else_has_the_ids_that_it_always_has(text: Text, content: str) -> None:
    """Whether the texts have control tokens or only could: both ways give the same ids."""
    control = text._control
    assert control is not None and text.chat is not None
    if control._all.near(content):
        return
    plain = text.chat.render(said(content))
    named = control._all.whole(plain, _name(text))
    found = text._ids(named, control._tokenizer_of_names(), special=False)
    assert found == text.encode_chat(said(content)) == text.encode(plain, special=False)


def _name(text: Text) -> str:
    """What the tokens of the second tokenizer begin with."""
    assert text._control is not None
    names = text._control._tokenizer_of_names().get_added_tokens_decoder().values()
    return next(each.content for each in names if each.content.endswith(END)).removesuffix(END)


def test_nobody_forges_what_the_second_tokenizer_reads(text: Text) -> None:
    forged = "\U00012000" + _name(text)[:3] + END + "<\U00012001|end|>"
    ids = text.encode_chat(said(forged))
    assert controls(text, ids) == OWN
    every = "".join(map(chr, [*range(0x12000, 0x12399), *range(0x13000, 0x13430)]))
    with pytest.raises(UsageError, match="cuneiform"):
        text.encode_chat(said(every + END))


def test_a_thought_that_is_sent_back_is_what_it_was(text: Text) -> None:
    messages = [*said("why"), {"role": "assistant", "content": f"<think>so {END}"}]
    assert controls(text, text.encode_chat(messages)) == [BEGIN, END, "<think>", END, "<think>"]


@pytest.mark.parametrize(
    "way", ["m | tojson(ensure_ascii=true)", "m", "m.content | title", "'%r' | format(m.content)"]
)
def test_no_mark_is_left_however_a_text_is_written(text: Text, way: str) -> None:
    written = opened(text._tokenizer, f"{{% set m = messages[0] %}}{{{{ {way} }}}}<|end|>")
    messages = said(f"\u00e9{END} <thin")
    ids = written.encode_chat(messages)
    assert controls(written, ids) == [END]
    assert written.chat is not None
    shown = written._tokenizer.decode(ids, skip_special_tokens=False)
    assert shown.strip() == written.chat.render(messages).strip()


def test_half_a_character_is_refused(text: Text) -> None:
    with pytest.raises(UsageError, match=r"half a character, U\+D83D at 6"):
        text.encode_chat(said("abc\ud83d"))
