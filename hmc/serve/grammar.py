"""Answers held to a grammar: JSON schemas, expressions and tool calls as masks over the vocabulary;
hides llguidance, and bounds what it may cost.

Anybody's schema is compiled, so compiling has a deadline and happens in threads of its own, and
every later step may do so much and no more: what goes beyond ends the request it belongs to.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDone
from typing import TYPE_CHECKING, Any

import llguidance
import numpy as np
import numpy.typing as npt

from hmc.errors import QueueFullError, UsageError
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
_LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=200_000,  # some 0.3 s with 150,000 tokens
    step_lexer_fuel=100_000,
    max_lexer_states=100_000,
    max_grammar_size=500_000,
    step_max_items=50_000,
    verbose_errors=False,
)
_COMPILE_SECONDS = 10.0
_COMPILERS = 2
"""Grammars that are compiled at a time."""
_MOST_WAITING = 64
_STEP_SECONDS, _SPARE_SECONDS = 0.02, 2.0
"""Processor time that the masks of an answer may take a token on average, and altogether more."""
_TOO_COMPLEX = "it is too complex to be followed: fewer or smaller repetitions and alternatives do"

_COMPLEX = ("too ", "Current row has ")
_EXPRESSION = re.compile(r"regex parse error: .*? error: ([^|]+?)(?: \d+ \||$)")


class Constraint:
    """A compiled grammar, and the first mask of every answer that is held to it."""

    def __init__(self, matcher: llguidance.LLMatcher, first: npt.NDArray[np.bool_]) -> None:
        self.matcher, self.first = matcher, first


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
        self._compilers = ThreadPoolExecutor(_COMPILERS, thread_name_prefix="hmc-grammar")
        self._places = threading.BoundedSemaphore(_MOST_WAITING)

    def json(self, schema: dict[str, Any]) -> Constraint:
        """JSON documents that satisfy a schema; `UsageError` for one that cannot be compiled, or
        not in time.
        """
        schemas.check(schema)
        grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, None, _SPELLING)
        return self._compiled("schema", grammar)

    def regex(self, pattern: str) -> Constraint:
        """Texts that a regular expression matches whole."""
        return self._compiled("regex", llguidance.LLMatcher.grammar_from_regex(pattern))

    def choice(self, texts: Sequence[str]) -> Constraint:
        """Any one of some texts."""
        rule = " | ".join(json.dumps(text) for text in texts)
        return self._compiled("choice", llguidance.LLMatcher.grammar_from_lark(f"start: {rule}"))

    def either(self, parts: Sequence[tuple[str, dict[str, Any], str]]) -> Constraint:
        """A literal text, a JSON document by a schema and another literal text, by any one of
        `parts`.
        """
        rules = [f"start: {' | '.join(f'part{i}' for i in range(len(parts)))}"]
        for number, (before, schema, after) in enumerate(parts):
            schemas.check(schema)
            schema = {**schema, "x-guidance": _SPELLING}
            words = [*self._literal(before), f"%json {json.dumps(schema)}", *self._literal(after)]
            rules.append(f"part{number}: {' '.join(words)}")
        grammar = llguidance.LLMatcher.grammar_from_lark("\n".join(rules))
        return self._compiled("schema", grammar)

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

    def mask(self, constraint: Constraint) -> GrammarMask:
        """A mask for one answer."""
        return GrammarMask(constraint, self._vocab, self._eos)

    def close(self) -> None:
        """Compile nothing more; what is being compiled is left behind."""
        self._compilers.shutdown(wait=False, cancel_futures=True)

    def _compiled(self, what: str, grammar: str) -> Constraint:
        """The constraint of a grammar; `what` it is for whoever sent it."""
        if not self._places.acquire(blocking=False):
            raise QueueFullError(f"{_MOST_WAITING} constraints are being compiled: try again later")
        work: Future[Constraint] = self._compilers.submit(self._compile, what, grammar)
        work.add_done_callback(lambda _: self._places.release())
        try:
            return work.result(_COMPILE_SECONDS)
        except NotDone:
            work.cancel()
            raise UsageError(
                f"the {what} cannot be used: it was not compiled within {_COMPILE_SECONDS:g} s"
            ) from None

    def _compile(self, what: str, grammar: str) -> Constraint:
        """In a thread of its own, without the interpreter's lock for most of the time."""
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=_LIMITS)
        first = np.zeros(self._vocab, np.bool_)
        tried = matcher
        if not matcher.is_error():  # some faults show only when it begins, or after a token
            first = _bits(matcher, self._vocab)
            tried = matcher.deep_copy()
            if (token := int(first.argmax())) not in self._eos and first[token]:
                tried.consume_token(token)
                tried.compute_bitmask()
        if matcher.is_error() or tried.is_error():
            raise UsageError(f"the {what} cannot be used: {_fault(tried)}")
        return Constraint(matcher, first)


class GrammarMask:
    """Which tokens may come next, for a scheduler's request; remembers what it has seen."""

    def __init__(self, constraint: Constraint, vocab: int, eos: tuple[int, ...]) -> None:
        self._matcher = constraint.matcher.deep_copy()
        self._first = constraint.first
        self._vocab = vocab
        self._end = np.zeros(vocab, np.bool_)
        self._end[list(eos)] = True
        self._seen = 0
        self._left = _SPARE_SECONDS

    def __call__(self, generated: list[int]) -> npt.NDArray[np.bool_]:
        """bool [vocab] of the tokens allowed after `generated`; `UsageError` when the grammar gives
        up, or takes too much time.
        """
        if not generated:
            return self._first
        begin = time.thread_time()
        for token in generated[self._seen :]:
            self._matcher.consume_token(token)
        self._left += _STEP_SECONDS * (len(generated) - self._seen)
        self._seen = len(generated)
        if self._matcher.is_stopped() and not self._matcher.is_error():
            return self._end
        allowed = _bits(self._matcher, self._vocab)
        self._left -= time.thread_time() - begin
        if self._matcher.is_error():
            raise UsageError(f"the answer's constraint cannot be used: {_fault(self._matcher)}")
        if self._left < 0:
            raise UsageError(f"the answer's constraint cannot be used: {_TOO_COMPLEX}")
        return allowed


def _bits(matcher: llguidance.LLMatcher, vocab: int) -> npt.NDArray[np.bool_]:
    bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
    return np.unpackbits(bits, count=vocab, bitorder="little").view(np.bool_)


def _fault(matcher: llguidance.LLMatcher) -> str:
    """Why a matcher has given up, in one line."""
    text = " ".join(matcher.get_error().replace("<non-verbose/>", "").split())
    if any(word in text for word in _COMPLEX):
        return _TOO_COMPLEX
    if found := _EXPRESSION.search(text):
        return f"the expression cannot be read: {found[1]}"
    return text[:300]
