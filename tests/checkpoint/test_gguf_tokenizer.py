"""Tokenizers of GGUF files against those that their vocabularies came from, id by id: the bundled
byte-level one, and one as SentencePiece makes them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import generate_merges

from hmc.checkpoint.gguf import read_tokenizer
from hmc.checkpoint.gguf.splitting import SPLITTINGS
from hmc.errors import TokenizerError
from hmc.runtime.tokens.files import TokenizerFiles
from hmc.runtime.tokens.text import Text
from hmc.serve.vocabulary import Vocabulary

KJV = Path(__file__).parents[2] / "examples/tiny-kjv"
TEXTS = [
    "In the beginning God created the heaven and the earth.",
    "  And  the earth was without form,\n\nand void; 1234567 89 it's IT'S they'll",
    "<|user|>Who art thou?<|assistant|>",
    "Grüße, 日本語の文字 🙂🙃 \t\r\n ½ ① e\u0301 \u1e9b\u0323 …“quoted” --- $%&",
    "",
    " ",
    "\n",
]
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)


def write(path: Path, **keys: Any) -> Path:
    """A GGUF file without tensors; `keys` without "tokenizer.ggml.", whole ones with a dot."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for name, value in keys.items():
        key = name.replace("__", ".")
        key = key if "." in key else f"tokenizer.ggml.{key}"
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def byte_level_keys(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """What converters write of a byte-level tokenizer."""
    described = json.loads(tokenizer.to_str())
    ids = tokenizer.get_vocab(with_added_tokens=True)
    added = {each["content"]: each["special"] for each in described["added_tokens"]}
    texts = sorted(ids, key=lambda text: ids[text])
    kinds = [CONTROL if added.get(each) else USER if each in added else NORMAL for each in texts]
    merges = [" ".join(pair) for pair in described["model"]["merges"]]
    return {"model": "gpt2", "pre": pre, "tokens": texts, "token_type": kinds, "merges": merges}


@pytest.fixture(scope="module")
def bundled(tmp_path_factory) -> Path:
    config = json.loads((KJV / "tokenizer_config.json").read_text())
    return write(
        tmp_path_factory.mktemp("gguf") / "kjv.gguf",
        **byte_level_keys(Tokenizer.from_file(str(KJV / "tokenizer.json")), "gpt-2"),
        bos_token_id=0, eos_token_id=1, add_bos_token=True, add_eos_token=False,
        tokenizer__chat_template=config["chat_template"],
        general__sampling__temp=0.8, general__sampling__top_p=0.95,
    )  # fmt: skip


def test_the_bundled_tokenizer_from_metadata(bundled) -> None:
    ours, theirs = Text.open(bundled), Text.open(KJV)
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, special=False) == theirs.encode(text, special=False)
    for token in range(4096):
        assert ours.decode([5, token]) == theirs.decode([5, token])
    chat = [{"role": "user", "content": "Who art thou?"}]
    assert ours.encode_chat(chat) == theirs.encode_chat(chat)
    assert ours.eos_token_ids == theirs.eos_token_ids == (1,)
    for key in ("do_sample", "temperature", "top_p"):
        assert ours.generation_config[key] == theirs.generation_config[key]
    tokens, same = (Vocabulary(TokenizerFiles.read(each)) for each in (bundled, KJV))
    assert all(tokens.bytes(n) == same.bytes(n) and tokens.hidden(n) == same.hidden(n)
               for n in range(4096))  # fmt: skip


@pytest.mark.slow
@settings(max_examples=50, deadline=None)
@given(st.text(max_size=40))
def test_any_text_through_the_bundled_tokenizer(bundled, text) -> None:
    assert _cached(bundled).encode(text) == _cached(KJV).encode(text)


_OPEN: dict[Path, Text] = {}


def _cached(location: Path) -> Text:
    return _OPEN.setdefault(location, Text.open(location))


@pytest.mark.parametrize(
    "pre", ["qwen2", "llama-bpe", "deepseek-v3", "gpt-4o", "kimi-k2", "qwen35"]
)
def test_words_are_cut_as_the_named_way_says(tmp_path, pre) -> None:
    """A tokenizer trained with a way of cutting, and the file that only names it."""
    way = SPLITTINGS[pre]
    tokenizer = Tokenizer(models.BPE(ignore_merges=way.whole_words))
    tokenizer.normalizer = normalizers.NFC() if way.composed else None
    cuts = [pre_tokenizers.Split(Regex(each), "isolated") for each in way.patterns]
    byte = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<think>"])
    keys = byte_level_keys(tokenizer, pre)
    ids = tokenizer.get_vocab()
    path = write(tmp_path / "a.gguf", **keys, eos_token_id=ids["e"])
    text = Text.open(path)
    for each in (*TEXTS, "<|im_start|>a<think>b</think><|im_end|>"):
        assert text.encode(each, special=False) == tokenizer.encode(each).ids
        assert text.decode(tokenizer.encode(each).ids) == tokenizer.decode(
            tokenizer.encode(each).ids
        )
    assert text.eos_token_ids == (ids["e"], ids["<|im_end|>"])  # the file's own, and the known one


WORDS = {
    "deepseek-v3": "a1234b 漢字ab .dot  two\n\n x",
    "qwen2": "a1234b 漢字ab .dot  two\n\n x",
    "kimi-k2": "a1234b 漢字ab .dot  two\n\n HelloWorld",
    "gpt-4o": "a1234b HelloWorld's .dot",
    "gpt-2": "a1234b don't .dot  two",
    "deepseek-llm": "a1234 漢字ab .dot  two\n\n x",
}
CUT = {
    "deepseek-v3": ["a", "123", "4", "b", " ", "漢字", "ab", " .", "dot", " ", " two", "\n\n",
                    " x"],
    "qwen2": ["a", "1", "2", "3", "4", "b", " 漢字ab", " .", "dot", " ", " two", "\n\n", " x"],
    "kimi-k2": ["a", "123", "4", "b", " ", "漢字", "ab", " .", "dot", " ", " two", "\n\n",
                " Hello", "World"],
    "gpt-4o": ["a", "123", "4", "b", " Hello", "World's", " .", "dot"],
    "gpt-2": ["a", "1234", "b", " don", "'t", " .", "dot", " ", " two"],
    "deepseek-llm": ["a", "1234", " ", "漢字", "ab", " .", "dot", " ", " two", "\n", "\n", " x"],
}  # fmt: skip


@pytest.mark.parametrize("pre", WORDS)
def test_what_is_a_word(pre) -> None:
    cuts = [pre_tokenizers.Split(Regex(each), "isolated") for each in SPLITTINGS[pre].patterns]
    words = [word for word, _ in pre_tokenizers.Sequence(cuts).pre_tokenize_str(WORDS[pre])]
    assert words == CUT[pre]


_WORDS = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UP, _LOW = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_END = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_CASES = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UP}*{_LOW}+{_END}|[^\r\n\p{{L}}\p{{N}}]?{_UP}+{_LOW}*{_END}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LISTED = {
    "mellum": [_GPT],
    "mellum2": [r"\p{N}", _GPT],
    "cohere2_moe": [r"\p{N}", _GPT],
    "llama4": [_CASES],
    "tiny_aya": [r"\d{1,3}(?=(?:\d{3})*\b)", _CASES],
    "laguna": ["[^\n]+|[\n]+", _WORDS],
    "afmoe": [
        r"(?r)\p{N}{1,3}",  # groups of three from the right
        "[一-鿿㐀-䶿豈-﫿぀-ゟ\u30a0-ヿ･-ﾟ⼀-⿟เ-๿຀-໿ក-៿က-႟ꩠ-ꩿꧠ-꧿가-힯ᄀ-ᇿ]+",
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ],
    "exaone-moe": [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
    ],
    "bailingmoe2": [
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
        r"|\s*[\r\n]|\s+(?!\S)|\s+"
    ],
}
"""Patterns as llama.cpp lists them, for another engine."""
NUMBERS = "1 12 123 1234 12345 1234567 a1234 1234a 1,234,567.89 ١٢٣٤٥ x_12345_y"


@pytest.mark.parametrize("pre", LISTED)
def test_words_are_cut_as_by_another_engine(pre) -> None:
    cuts = [pre_tokenizers.Split(Regex(each), "isolated") for each in SPLITTINGS[pre].patterns]
    for text in (*TEXTS, *WORDS.values(), NUMBERS):
        words = [text]
        for pattern in LISTED[pre]:
            words = [part for word in words for part in _cut(pattern, word)]
        found = pre_tokenizers.Sequence(cuts).pre_tokenize_str(text)
        assert [word for word, _ in found if word] == words


def _cut(pattern: str, text: str) -> list[str]:
    spans = sorted(match.span() for match in regex.finditer(pattern, text))
    at, found = 0, []
    for start, end in (*spans, (len(text), len(text))):
        found += [text[at:start], text[start:end]]
        at = end
    return [part for part in found if part]


@pytest.mark.parametrize("pre", sorted(SPLITTINGS))
def test_every_pattern_is_one(pre) -> None:
    for pattern in SPLITTINGS[pre].patterns:
        cut = pre_tokenizers.Split(Regex(pattern), "isolated")
        assert "".join(word for word, _ in cut.pre_tokenize_str(TEXTS[3])) == TEXTS[3]


@pytest.fixture(scope="module")
def sentence_piece() -> tuple[Tokenizer, list[tuple[str, float, int]]]:
    """A tokenizer as transformers makes it of SentencePiece's pieces: text, score, kind."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    trained.train_from_iterator(TEXTS * 3, trainer)
    described = json.loads(trained.to_str())["model"]
    made = [left + right for left, right in described["merges"]]
    letters = [text for text in described["vocab"] if text not in made]
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    known = [*dict.fromkeys(made), *letters]
    pieces += [(text, -float(rank), NORMAL) for rank, text in enumerate(known)]
    vocabulary = {text: number for number, (text, _, _) in enumerate(pieces)}
    scores = {text: score for text, score, kind in pieces if kind == NORMAL}
    merges = generate_merges(vocabulary, scores)
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer, pieces


def sentence_piece_keys(pieces: list[tuple[str, float, int]]) -> dict[str, Any]:
    texts, scores, kinds = (list(each) for each in zip(*pieces, strict=True))
    return {"model": "llama", "tokens": texts, "scores": scores, "token_type": kinds}


def test_scores_make_the_merges(sentence_piece, tmp_path) -> None:
    tokenizer, pieces = sentence_piece
    keys = sentence_piece_keys(pieces)
    path = write(tmp_path / "a.gguf", **keys, bos_token_id=1, eos_token_id=2, unknown_token_id=0)
    text = Text.open(path)
    for each in (*TEXTS, "a <s> b</s>", "Ω unknown characters ∑ 字"):
        ids = tokenizer.encode(each).ids
        assert text.encode(each) == [1, *ids]  # texts begin so where the file does not say
        assert text.decode(ids) == tokenizer.decode(ids)
    assert text.eos_token_ids == (2,)
    plain = write(tmp_path / "b.gguf", **keys, add_bos_token=False, add_space_prefix=False)
    assert Text.open(plain).decode(Text.open(plain).encode(" a b")) == " a b"


@pytest.mark.parametrize("kind", [{"model": "gemma4"}, {"model": "gpt2", "pre": "sarvam-moe"}])
def test_merges_of_characters(sentence_piece, tmp_path, kind) -> None:
    theirs, pieces = sentence_piece
    tokenizer = Tokenizer.from_str(theirs.to_str())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    keys = sentence_piece_keys(pieces) | {"merges": merges, **kind}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "add_bos_token": True}
    text = Text.open(write(tmp_path / "a.gguf", **keys, **ends, add_space_prefix=False))
    for each in (*TEXTS, " a  b <s>", "Ω unknown characters ∑ 字"):
        ids = tokenizer.encode(each).ids
        assert text.encode(each) == [1, *ids]
        assert text.decode(ids) == tokenizer.decode(ids)


def test_tokens_that_end_an_answer(tmp_path) -> None:
    texts = ["a", "<turn|>", "<|tool_response>", "<|end|>", "<|flush|>", "<|calls|>"]
    kinds = {"token_type": [NORMAL, CONTROL, USER, CONTROL, CONTROL, CONTROL]}
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": texts, "merges": [], **kinds}
    found = read_tokenizer(write(tmp_path / "a.gguf", **keys))
    assert found.generation["eos_token_id"] == [1, 2, 4, 5]


def test_no_vocabulary_and_unused_tokens(tmp_path) -> None:
    assert Text.open(write(tmp_path / "a.gguf", eos_token_id=3)) is None
    keys = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "[PAD1]"], "token_type": [1, 5]}
    found = read_tokenizer(write(tmp_path / "b.gguf", **keys, merges=[]))
    assert found.tokenizer["model"]["vocab"] == {"a": 0}


GOOD: dict[str, Any] = {"model": "gpt2", "pre": "gpt-2", "tokens": ["a", "b", "ab"],
                        "token_type": [1, 1, 1], "merges": ["a b"]}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model is 'bert'; hmc reads gpt2, llama, gemma4"),
        ({"pre": "nobody-knows"}, "'nobody-knows': hmc does not know how this tokenizer cuts"),
        ({"pre": "default"}, "'default': hmc does not know"),
        ({"merges": ["ab"]}, "'ab' is no pair"),
        ({"merges": ["a c"]}, "not a readable tokenizer"),
        ({"token_type": [1, 1]}, "has 3 tokens and 2 token types"),
        ({"tokens": ["a", "a", "b"]}, "token 'a' stands there twice"),
        ({"token_type": "x"}, "tokenizer.ggml.token_type is no array of numbers"),
        ({"model": "llama"}, "has 3 tokens and 0 scores"),
    ],
)
def test_what_is_no_tokenizer_is_one_line(tmp_path, changed, said) -> None:
    with pytest.raises(TokenizerError, match=r"a\.gguf: ") as caught:
        Text.open(write(tmp_path / "a.gguf", **{**GOOD, **changed}))
    assert said in str(caught.value) and "\n" not in str(caught.value)
