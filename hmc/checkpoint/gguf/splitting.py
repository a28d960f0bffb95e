"""How byte-level vocabularies cut a text into words before they merge: by the name that GGUF files
give each way, `tokenizer.ggml.pre`.

Patterns are those of the tokenizers that models were published with (their tokenizer.json, or
tiktoken patterns), which llama.cpp lists beside its own adaptations (src/llama-vocab.cpp). They are
tried one after the other, each on what the ones before left in one piece.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
_NO_HAN = r"&&[^\p{Han}]]"


def _words(digits: str, letters: str = r"\p{L}+", symbols: str = _SYMBOLS) -> str:
    """Words as tiktoken's cl100k has them, with so many digits a piece."""
    return f"{_CONTRACTION}|{_BEFORE}{letters}|{digits}|{symbols}|{_SPACES}"


def _cased(digits: str, contraction: str, symbols: str, upper: str = _UPPER,
           lower: str = _LOWER) -> str:  # fmt: skip
    """Words as tiktoken's o200k has them, which end before a capital."""
    return (
        f"{_BEFORE}{upper}*{lower}+{contraction}|{_BEFORE}{upper}+{lower}*{contraction}|{digits}"
        f"|{symbols}|{_SPACES}"
    )


_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|" + _SPACES,
)
_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}+",
)
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
_THREES = r"(?<!\p{N})\p{N}{1,2}(?=(?:\p{N}{3})+(?!\p{N}))"
"""The one or two digits before groups of three, counted from the right: found at the start of a
number, so that long ones take no quadratic time.
"""
_THREES_OF_WORDS = r"(?<!\d)(?:\d{1,2}(?=(?:\d{3})*\b)|(?:\d{3})+\b)"
_ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\uf900-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f"
    "\u2f00-\u2fdf\u0e00-\u0e7f\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f"
    "\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
"""Scripts that are written without spaces, and Korean's."""
_LETTERS_APART = rf"{_BEFORE}(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+"
_EXAONE = (
    rf"{_CONTRACTION}|{_LETTERS_APART}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Splitting:
    """The `patterns`; whether text is composed first (Unicode NFC), whether a word that is a token
    is one whatever its merges say, and whether texts begin with the beginning token where a file
    does not say.
    """

    patterns: tuple[str, ...]
    composed: bool = False
    whole_words: bool = False
    begins: bool = False


_LLAMA3 = Splitting((_words(r"\p{N}{1,3}"),), whole_words=True, begins=True)
_QWEN2 = Splitting((_words(r"\p{N}"),), composed=True)
_O200K = _cased(r"\p{N}{1,3}", f"{_CONTRACTION}?", r" ?[^\s\p{L}\p{N}]+[\r\n/]*")
_KIMI = r"\p{Han}+|" + _cased(
    r"\p{N}{1,3}", f"{_CONTRACTION}?", _SYMBOLS, _UPPER[:-1] + _NO_HAN, _LOWER[:-1] + _NO_HAN
)

SPLITTINGS: Mapping[str, Splitting] = {
    **dict.fromkeys(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "mellum"), Splitting((_GPT2,))
    ),
    **dict.fromkeys(
        (
            "starcoder",
            "refact",
            "command-r",
            "smollm",
            "codeshell",
            "exaone",
            "minerva-7b",
            "cohere2_moe",
            "mellum2",
        ),
        Splitting((r"\p{N}", _GPT2)),
    ),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez"), _QWEN2),
    "qwen35": Splitting(
        (_words(r"\p{N}", r"[\p{L}\p{M}]+", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),), composed=True
    ),
    **dict.fromkeys(("stablelm2", "hunyuan", "solar-open"), Splitting((_words(r"\p{N}"),))),
    **dict.fromkeys(
        ("chatglm-bpe", "glm4", "dbrx", "smaug-bpe"), Splitting((_words(r"\p{N}{1,3}"),))
    ),
    "deepseek-llm": Splitting(_DEEPSEEK),
    "deepseek-coder": Splitting(_DEEPSEEK_CODER),
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), Splitting(_DEEPSEEK3)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), Splitting((_O200K,))),
    "tiny_aya": Splitting((_THREES_OF_WORDS, _O200K)),
    "laguna": Splitting((r"[^\n]+|\n+", _words(r"\p{N}"))),
    "afmoe": Splitting((_THREES, r"\p{N}{1,3}", _ASIAN, _DEEPSEEK3[-1])),
    "exaone-moe": Splitting((_EXAONE,)),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), Splitting((_BAILING,))),
    "tekken": Splitting(
        (_cased(r"\p{N}", "", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"),), whole_words=True, begins=True
    ),
    "kimi-k2": Splitting((_KIMI,), whole_words=True),
    "seed-coder": Splitting((_words(r"\p{N}", symbols=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    "grok-2": Splitting((_words(r"\p{N}"),)),
}
"""Rows by name."""
