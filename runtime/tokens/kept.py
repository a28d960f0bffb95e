"""A sequence that stays in the cache from one prompt of a conversation to the next, so that only
what is new of a prompt is computed; hides how far back a sequence can be taken.

The tokens of an answer stay as decode steps wrote them. Where the next prompt differs from what is
stored, the sequence is cut there, unless that is not possible: states a sequence and rings hold no
past (plan/states.py), and blocks that others may find are not written to. Then a new sequence takes
what the prefix index knows (memory/prefix.py): of states also what follows an answer, which it
knows for the conversation alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from hmc.closing import Closing
from hmc.runtime.executor import Executor
from hmc.runtime.memory.kv import Sequence

Ids = npt.NDArray[np.int32]

_OWNER = -2
"""In the prefix index: nobody's ticket, and not everybody."""


class Kept(Closing):
    """At most one sequence of an executor; `close` gives its place back. Not for several threads,
    nor for two generations at a time.
    """

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._sequence: Sequence | None = None
        self._ids: Ids = np.empty(0, np.int32)
        self._prefilled = 0  # leading tokens that a prefill wrote, not a decode step
        self._common = 0  # of these, what is in blocks that everybody may find

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._ids)

    @contextmanager
    def holding(self, ids: Ids, said: list[int]) -> Iterator[Sequence]:
        """A sequence that holds the beginning of a prompt `ids` i32 [tokens], never all of it, for
        the length of a `with` in which the rest is appended, and then tokens of `said`.

        After an error in the `with` nothing of it is trusted, so nothing is kept.
        """
        sequence = self._fitting(ids)
        self._ids = ids[: sequence.length]
        try:
            yield sequence
        except GeneratorExit:  # ended between two calls of the executor
            self._store(sequence, ids, said)
            raise
        except BaseException:
            self.close()
            raise
        self._store(sequence, ids, said)

    def grown(self, sequence: Sequence, ids: Ids) -> None:
        """A chunk of the prompt has been appended: it is kept for prompts that begin alike."""
        kv = self._executor.kv
        if self._prefilled >= len(self._ids):
            kv.keep(sequence, ids)
            self._ids = ids[: sequence.length]
            self._prefilled = sequence.length
            self._common = sequence.length // kv.block * kv.block
        elif kv.layout.bytes_per_sequence:
            kv.keep_own(sequence, ids, self._common, _OWNER)

    def close(self) -> None:
        """Forget what was kept."""
        if self._sequence is not None:
            self._executor.release(self._sequence)
        self._sequence, self._ids, self._prefilled = None, self._ids[:0], 0

    def _fitting(self, ids: Ids) -> Sequence:
        """The sequence, cut to what it has in common with a prompt, or a new one."""
        kv, alike = self._executor.kv, _alike(self._ids, ids[:-1])
        found = self._sequence
        if found is not None:
            first = len(self._ids) if kv.layout.bytes_per_sequence else found.indexed * kv.block
            if alike >= first:
                found.length = alike
                found.stops = kv.layout.stops(alike, len(ids))
                self._prefilled = min(self._prefilled, alike)
                return found
            self.close()
        self._sequence = found = self._executor.open()
        if kv.layout.bytes_per_sequence and alike >= max(self._common, kv.block):
            past = kv.adopt(found, ids, max(1, self._common), _OWNER)
            found.stops = kv.layout.stops(past, len(ids))
            self._prefilled = min(past, self._common)
        else:
            self._prefilled = kv.adopt(found, ids)
        return found

    def _store(self, sequence: Sequence, ids: Ids, said: list[int]) -> None:
        self._ids = np.concatenate([ids, np.array(said, np.int32)])[: sequence.length]


def _alike(one: Ids, other: Ids) -> int:
    """How many tokens two lists begin with in common."""
    most = min(len(one), len(other))
    differ = np.flatnonzero(one[:most] != other[:most])
    return int(differ[0]) if len(differ) else most
