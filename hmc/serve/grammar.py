"""Answers held to a grammar: JSON schemas and tool calls as masks over the vocabulary; hides
llguidance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np
import numpy.typing as npt

from hmc.errors import ExecutionError, UsageError
from hmc.serve import schemas
from hmc.serve.vocabulary import Vocabulary

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# One spelling of white space: free choice lets a model that is at a loss write blanks for ever.
_SPELLING: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
}


class Grammars:
    """Compiles grammars for one tokenizer; may be used from any thread."""

    def __init__(self, vocabulary: Vocabulary, vocab: int, eos: Sequence[int]) -> None:
        """`vocab` is the width of the logits."""
        if not eos:
            raise UsageError("a constrained answer needs a model with an end-of-text token")
        self._vocab, self._eos = vocab, tuple(eos)
        self._special = vocabulary.special
        self._tokenizer = llguidance.LLTokenizer(
            vocabulary.described, n_vocab=vocab, eos_token=list(eos)
        )

    def json(self, schema: dict[str, Any]) -> str:
        """The grammar of JSON documents that satisfy a schema; `UsageError` for one that cannot be
        compiled.
        """
        schemas.check(schema)
        return self._checked(llguidance.LLMatcher.grammar_from_json_schema(schema, None, _SPELLING))

    def regex(self, pattern: str) -> str:
        """The grammar of texts that a regular expression matches whole."""
        return self._checked(llguidance.LLMatcher.grammar_from_regex(pattern))

    def choice(self, texts: Sequence[str]) -> str:
        """The grammar of any one of some texts."""
        rule = " | ".join(json.dumps(text) for text in texts)
        return self._checked(llguidance.LLMatcher.grammar_from_lark(f"start: {rule}"))

    def either(self, parts: Sequence[tuple[str, dict[str, Any], str]]) -> str:
        """The grammar of a literal text, a JSON document by a schema and another literal text, by
        any one of `parts`.
        """
        rules = [f"start: {' | '.join(f'part{i}' for i in range(len(parts)))}"]
        for number, (before, schema, after) in enumerate(parts):
            schemas.check(schema)
            schema = {**schema, "x-guidance": _SPELLING}
            words = [*self._literal(before), f"%json {json.dumps(schema)}", *self._literal(after)]
            rules.append(f"part{number}: {' '.join(words)}")
        return self._checked(llguidance.LLMatcher.grammar_from_lark("\n".join(rules)))

    def _literal(self, text: str) -> list[str]:
        """A literal text as a grammar says it: special tokens by their ids."""
        if not self._special:
            return [json.dumps(text)] if text else []
        found = re.split(f"({'|'.join(map(re.escape, self._special))})", text)
        return [
            f"<[{self._special[each]}]>" if each in self._special else json.dumps(each)
            for each in found
            if each
        ]

    def mask(self, grammar: str) -> GrammarMask:
        """A mask for one answer."""
        return GrammarMask(self._tokenizer, grammar, self._vocab, self._eos)

    def _checked(self, grammar: str) -> str:
        failed, faults = llguidance.LLMatcher.validate_grammar_with_warnings(
            grammar, self._tokenizer
        )
        fault = faults[0] if failed else ""
        if not failed:  # some faults show only when it begins
            matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
            matcher.compute_bitmask()
            fault = matcher.get_error() if matcher.is_error() else ""
        if fault:
            raise UsageError(f"the schema cannot be used: {' '.join(fault.split())[:300]}")
        return grammar


class GrammarMask:
    """Which tokens may come next, for a scheduler's request; remembers what it has seen."""

    def __init__(
        self, tokenizer: llguidance.LLTokenizer, grammar: str, vocab: int, eos: tuple[int, ...]
    ) -> None:
        self._matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0)
        self._vocab = vocab
        self._end = np.zeros(vocab, np.bool_)
        self._end[list(eos)] = True
        self._seen = 0

    def __call__(self, generated: list[int]) -> npt.NDArray[np.bool_]:
        """bool [vocab] of the tokens allowed after `generated`; `ExecutionError` when the grammar
        gives up.
        """
        for token in generated[self._seen :]:
            self._matcher.consume_token(token)
        self._seen = len(generated)
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return self._end
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise ExecutionError(f"the grammar failed: {self._matcher.get_error()}")
        return np.unpackbits(bits, count=self._vocab, bitorder="little").astype(np.bool_)
