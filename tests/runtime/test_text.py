"""Tokenizers of both kinds (byte-level, byte fallback): framing, chat templates, whole characters,
stop strings.
"""

import json
import threading
import time

import pytest
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
    trainers,
)

from hmc.errors import ContextLengthError, TokenizerError, UsageError
from hmc.runtime.tokens.longest import most_bytes
from hmc.runtime.tokens.text import Detokenizer, StopStrings, Text

SAMPLE = "Grüße 日本語の文字 🙂🙃 emoji 👩‍👩‍👧 and plain words, plain words. "


def byte_level():
    """Byte-level BPE whose merges cross character borders, as a pre-tokeniser without a pattern
    lets them.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>", "</s>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([SAMPLE, SAMPLE[3:], SAMPLE[::-1]], trainer)
    return tokenizer


def byte_fallback():
    """Llama-like: spaces as U+2581, unknown characters as byte tokens."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        *"abcdeilmnoprstw\u2581",
    ]
    tokenizer = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    def make(tokenizer, **files):
        folder = tmp_path_factory.mktemp("checkpoint")
        if tokenizer is not None:
            tokenizer.save(str(folder / "tokenizer.json"))
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    return make


@pytest.fixture(scope="module")
def texts(write):
    return {f.__name__: Text.open(write(f())) for f in (byte_level, byte_fallback)}


def stream(text, ids, prompt=()):
    detokenizer = Detokenizer(text, prompt)
    pieces = [detokenizer.push(token) for token in ids]
    return [*pieces, detokenizer.flush()]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab il日本語🙂é👩‍👧\n", max_size=40))
def test_streamed_text_is_the_text_and_whole_characters(texts, kind, content):
    text = texts[kind]
    ids = text.encode(content, special=False)
    pieces = stream(text, ids)
    assert "".join(pieces) == text.decode(ids)
    assert "\ufffd" not in "".join(pieces)


def test_emoji_arrives_only_when_complete(texts):
    ids = texts["byte_fallback"].encode("🙂", special=False)[1:]  # after the space
    assert len(ids) == 4
    assert stream(texts["byte_fallback"], ids) == ["", "", "", "🙂", ""]


def test_cut_character_is_flushed_once(texts):
    ids = texts["byte_fallback"].encode("a🙂", special=False)[:-1]
    pieces = stream(texts["byte_fallback"], ids)
    assert pieces[:2] == ["", "a"]
    assert set(pieces[2:-1]) == {""}
    assert set(pieces[-1]) == {"\ufffd"}


def test_leading_space_survives_after_a_prompt(texts):
    text = texts["byte_fallback"]
    prompt, answer = text.encode("ab", special=False), text.encode("il", special=False)
    assert "".join(stream(text, answer, prompt)) == " il"
    assert "".join(stream(text, answer)) == "il"


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_endless_invalid_bytes_neither_stall_nor_pile_up(texts, kind):
    text = texts[kind]
    lead = text._tokenizer.token_to_id("<0xE4>" if kind == "byte_fallback" else "ä")
    detokenizer = Detokenizer(text)
    given_out = sum(len(detokenizer.push(lead)) for _ in range(300))
    assert given_out >= 270
    assert len(detokenizer._window) < 64
    assert given_out + len(detokenizer.flush()) == 300
    ascii_ids = text.encode("ab", special=False)
    assert "".join(detokenizer.push(token) for token in ascii_ids).endswith("ab")


@settings(max_examples=150, deadline=None)
@given(st.text("abc", max_size=20), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_at_the_first_match_whatever_the_pieces(content, stops):
    hits = [content.find(stop) for stop in stops if stop in content]
    # The first stop string to be *completed* ends the stream, and the cut is at the earliest start
    # known then.
    for sizes in (1, 2, 3, 20):
        matcher, out, hit = StopStrings(stops), "", False
        for at in range(0, len(content), sizes):
            piece, hit = matcher.push(content[at : at + sizes])
            out += piece
            if hit:
                break
        out += "" if hit else matcher.flush()
        assert hit == bool(hits)
        if not hits:
            assert out == content
        else:
            assert content.startswith(out)
            assert matcher.met in stops and content.startswith(matcher.met, len(out))
            assert not any(stop in out for stop in stops)


def test_stop_string_is_held_back_until_it_cannot_match():
    matcher = StopStrings("END")
    assert matcher.push("the E") == ("the ", False)
    assert matcher.push("N") == ("", False)
    assert matcher.push("X E") == ("ENX ", False)
    assert matcher.push("ND of it") == ("", True)
    for wrong in ("", ["a", ""]):
        with pytest.raises(UsageError, match="stop"):
            StopStrings(["x", *([wrong] if wrong == "" else wrong)])


def test_bos_and_eos_follow_the_config_over_the_post_processor(write):
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    bare = tokenizer.encode("plain", add_special_tokens=False).ids
    names = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    cases = [
        ({}, [0, *bare]),
        ({"add_bos_token": False}, bare),
        ({"add_bos_token": True, "add_eos_token": True}, [0, *bare, 1]),
        ({"add_bos_token": True, "bos_token": None}, bare),
    ]
    for config, expected in cases:
        text = Text.open(write(tokenizer, tokenizer_config={**names, **config}))
        assert text.encode("plain") == expected
        assert text.encode("plain", special=False) == bare


TEMPLATE = """{{ bos_token }}{% for m in messages %}
{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('no role ' + m.role) }}{% endif %}
{% if loop.index > 9 %}{% break %}{% endif %}
[{{ m.role }}]{% generation %}{{ m.content | trim }}{% endgeneration %}{{ tools | tojson }}
{% endfor %}{{ strftime_now('%Y')[:1] }}{% if add_generation_prompt %}>{% endif %}"""


@pytest.mark.parametrize("place", ["string", "list", "file"])
def test_chat_template_from_each_place(write, place):
    config = {"bos_token": "<s>"}
    if place == "string":
        config["chat_template"] = TEMPLATE
    elif place == "list":
        config["chat_template"] = [
            {"name": "tools", "template": "x"},
            {"name": "default", "template": TEMPLATE},
        ]
    folder = write(byte_level(), tokenizer_config=config)
    if place == "file":
        (folder / "chat_template.jinja").write_text(TEMPLATE)
    text = Text.open(folder)
    shown = text.chat.render([{"role": "user", "content": " <hi> "}], tools=[{"a": "<é>"}])
    assert shown == '<s>[user]<hi>[{"a": "<é>"}]\n2>'
    assert text.encode_chat([{"role": "user", "content": "x"}])[0] == 0
    with pytest.raises(UsageError, match="no role system"):
        text.chat.render([{"role": "system", "content": ""}])


def test_chat_template_agrees_with_transformers(write):
    transformers = pytest.importorskip("transformers")
    folder = write(byte_level(), tokenizer_config={"bos_token": "<s>", "chat_template": TEMPLATE})
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>"
    )
    messages = [{"role": "user", "content": " a\n"}, {"role": "assistant", "content": "b"}]
    expected = oracle.apply_chat_template(
        messages, chat_template=TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert Text.open(folder).chat.render(messages) == expected


def test_untrusted_template_stays_in_its_sandbox(write):
    template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    text = Text.open(write(byte_level(), tokenizer_config={"chat_template": template}))
    with pytest.raises(UsageError, match="unsafe"):
        text.chat.render([])


def test_what_ends_an_answer_is_all_that_any_file_names(write):
    def ends(**files):
        return Text.open(write(byte_level(), **files)).eos_token_ids

    config, inner = {"eos_token_id": 5}, {"text_config": {"eos_token_id": [6, 5]}}
    generation, named = {"eos_token_id": [1, 7]}, {"eos_token": {"content": "</s>"}}
    assert ends(config=config, generation_config=generation) == (1, 7, 5)
    assert ends(config=config | inner, tokenizer_config=named) == (5, 6, 1)
    assert ends(config=inner, generation_config=generation, tokenizer_config=named) == (1, 7, 6, 5)
    assert ends(tokenizer_config=named) == (1,)
    assert ends(special_tokens_map={"eos_token": "</s>"}) == (1,)
    assert ends(tokenizer_config={"eos_token": "<nobody>"}) == ends() == ()
    for wrong in ("</s>", [True], [-1], 1.5):
        with pytest.raises(
            TokenizerError, match=r"generation_config\.json: eos_token_id .* no token"
        ):
            ends(generation_config={"eos_token_id": wrong})


def test_absent_and_corrupt_files(write):
    assert Text.open(write(None)) is None
    broken = write(None)
    (broken / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        Text.open(broken)
    for name, content in [("tokenizer_config", "{"), ("generation_config", "[1]")]:
        folder = write(byte_level())
        (folder / f"{name}.json").write_text(content)
        with pytest.raises(TokenizerError, match=name):
            Text.open(folder)
    bad = write(byte_level(), tokenizer_config={"chat_template": "{% if %}"})
    with pytest.raises(TokenizerError, match="chat template is broken"):
        Text.open(bad)
    plain = Text.open(write(byte_level()))
    with pytest.raises(UsageError, match="no chat template"):
        plain.encode_chat([])


def test_added_special_tokens_are_left_out_of_text(write):
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    text = Text.open(write(tokenizer))
    ids = text.encode("a<|im_end|><think>b", special=False)
    assert "".join(stream(text, ids)) == text.decode(ids) == "a<think>b"


def test_special_tokens_are_shown_where_they_are_markers(write):
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|channel|>", "<|end|>", "[THINK]"])
    text = Text.open(write(tokenizer))
    ids = text.encode("a<|channel|>b[THINK]c<|end|>", special=False)
    assert text.decode(ids) == "abc"
    shown = text.showing(["<|channel|>thought\n", "[THINK]"])
    assert "".join(stream(shown, ids)) == shown.decode(ids) == "a<|channel|>b[THINK]c"
    assert text.decode(ids) == text.showing([]).decode(ids) == "abc"


def test_a_text_too_long_for_the_context_is_refused_unread(write):
    folder = write(byte_level())
    vocabulary = byte_level().get_vocab()
    longest = most_bytes(json.loads((folder / "tokenizer.json").read_text()))
    assert longest == max(map(len, vocabulary))
    token = max(vocabulary, key=len)
    piece = byte_level().decode([vocabulary[token]], skip_special_tokens=False)
    text = Text.open(folder, 10)
    fits = "a" * (10 * longest)
    assert len(text.encode(fits)) > 10  # whose tokens are short: the one who counts them refuses it
    assert len(piece.encode()) <= longest
    text._tokenizer = None
    with pytest.raises(ContextLengthError, match=f"{10 * longest + 1} bytes"):
        text.encode(fits + "a")
    with pytest.raises(ContextLengthError):
        text.encode("\u20ac" * (4 * longest))


def test_tokenizers_that_drop_text_have_no_longest_token():
    def bound(change):
        tokenizer = byte_level()
        change(tokenizer)
        return most_bytes(json.loads(tokenizer.to_str()))

    plain = bound(lambda tokenizer: None)
    assert bound(lambda t: setattr(t, "normalizer", normalizers.NFC())) == 4 * plain
    assert bound(lambda t: setattr(t, "normalizer", normalizers.Strip())) is None
    assert bound(lambda t: t.add_tokens([AddedToken("<m>", lstrip=True)])) is None
    removed = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    assert bound(lambda t: setattr(t, "pre_tokenizer", removed)) is None
    fallback = json.loads(byte_fallback().to_str())
    assert most_bytes(fallback) == len("<0x00>")
    del fallback["model"]["vocab"]["<0x41>"]
    assert most_bytes(fallback) is None


def test_other_threads_run_while_a_text_is_tokenised(write):
    """`encode` holds the interpreter for the whole of it."""
    text, beats, ended = Text.open(write(byte_level())), [], threading.Event()

    def beat():
        while not ended.wait(0.001):
            beats.append(time.monotonic())

    thread = threading.Thread(target=beat)
    thread.start()
    begin = time.monotonic()
    text.encode(SAMPLE * 6000)
    end = time.monotonic()
    ended.set()
    thread.join()
    assert any(begin + 0.1 * (end - begin) < at < begin + 0.6 * (end - begin) for at in beats)


def test_settings_of_training_change_no_prompt(write):
    tokenizer = byte_level()
    plain = tokenizer.encode(SAMPLE).ids
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=500)
    assert Text.open(write(tokenizer)).encode(SAMPLE) == plain
