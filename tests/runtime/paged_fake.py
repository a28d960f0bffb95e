"""What tests of scheduling share: requests, and an executor without a model.

It keeps tokens in the blocks of a real `KVCache`'s tables and answers from what it reads back
there, so a block shared, reused or written wrongly changes an answer.
"""

from __future__ import annotations

import random
import threading
import zlib
from contextlib import contextmanager
from functools import reduce
from types import SimpleNamespace

import numpy as np
from layouts import keys_and_values, layout

from hmc.errors import WorkerError
from hmc.ops import State
from hmc.plan.phases import DECODE, PREFILL
from hmc.runtime.executor import Executor
from hmc.runtime.memory.kv import KVCache
from hmc.runtime.tokens.generation import Ends
from hmc.runtime.tokens.requests import Request
from hmc.runtime.tokens.sampler import Sampler, SamplingParams
from hmc.runtime.tokens.text import StopStrings

VOCAB, BLOCK, EOS = 50, 4, 1
STATE = State("state", 1, "sequence", "f32")
WAIT = 60


def request(ids, new=8, *, eos=(EOS,), stop=None, **options):
    ids = np.array(ids, np.int32)
    sampling = SamplingParams(**options.pop("sampling", {}))
    return Request(
        ids, Sampler(sampling, ids.tolist()), Ends(new, eos, StopStrings(stop)), **options
    )


def prompts(count, longest, vocab, seed=0):
    """Prompts of many lengths; half of them begin like another one."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        head = rng.choice(made)[: rng.randrange(longest)] if made and rng.random() < 0.5 else []
        made.append(head + [rng.randrange(2, vocab) for _ in range(rng.randrange(1, longest))])
        made[-1] = made[-1][:longest]
    return made


def tokens_of(ticket):
    assert ticket.wait(WAIT)
    return list(ticket.result().token_ids)


def reference(ids, new, eos=(EOS,)):
    """The greedy answer to `ids`, without any cache."""
    tokens = list(ids)
    for _ in range(new):
        tokens.append(_next(tokens))
        if tokens[-1] in eos:
            break
    return tokens[len(ids) :]


@contextmanager
def crowded(kv, left):
    """All but `left` blocks of a cache are somebody else's in the `with` block."""
    held = kv.allocator.take(kv.allocator.count - left)
    yield
    kv.allocator.give_back(held)


class PagedFake:
    """`fault` is raised by the next call; `gate` cleared holds every call up. With room for some
    `snapshots`, a sequence has a state of all its tokens, too, which is checked in every call.
    """

    def __init__(self, *, batch=4, context=64, chunk=16, capacity=128, switches=(), snapshots=None):
        states, sizes = keys_and_values(1, 1), {"tokens": capacity, "sequences": batch}
        if snapshots is not None:
            states, sizes = (*states, STATE), {**sizes, "snapshots": snapshots}
        kept = layout(*states, block=BLOCK, **sizes)
        phases = {
            PREFILL: SimpleNamespace(max_tokens=chunk),
            "prefill.stream": SimpleNamespace(max_tokens=context, ranks=1),
            DECODE: SimpleNamespace(max_tokens=batch),
        }
        self.plan = SimpleNamespace(
            limits=SimpleNamespace(max_context=context, max_chunk=chunk, max_batch=batch),
            model=SimpleNamespace(vocab=VOCAB),
            switches=switches,
            phases=(),
            kv=kept,
            phase=phases.__getitem__,
        )
        self.kv = KVCache(kept, context)
        self.stored = np.full((self.kv.allocator.count, BLOCK), -1, np.int32)
        self.states = None if snapshots is None else self.kv.array(0, STATE.name)
        self.beside = None
        self.calls = []
        self.fault = None
        self.gate = threading.Event()
        self.gate.set()

    def open(self):
        return self.kv.open()

    def release(self, sequence):
        self.kv.release(sequence)

    chunk = Executor.chunk

    def append(self, sequence, ids, rows, phase=PREFILL):
        self._begin((phase, len(ids)))
        assert 0 < len(ids) <= self.plan.phase(phase).max_tokens
        self.kv.reserve(sequence, len(ids))
        start = sequence.length
        for token in ids:
            self._write(sequence, int(token))
        assert sequence.length == start + len(ids)
        context = self._read(sequence)
        return np.array([_logits(context[: start + row + 1]) for row in rows]).reshape(-1, VOCAB)

    def decode(self, sequences, tokens, phase=DECODE, best=None):
        self._begin((phase, len(sequences)))
        assert 0 < len(sequences) <= self.plan.limits.max_batch
        rows = []
        for sequence, token in zip(sequences, tokens, strict=True):
            self.kv.reserve(sequence, 1)
            self._write(sequence, int(token))
            rows.append(_logits(self._read(sequence)))
        for row, few in zip(rows, best if best and all(best) else (), strict=False):
            row[row < np.sort(row)[-min(few, len(row))]] = -np.inf
        return np.array(rows)

    def close(self):
        self.kv.close()

    def _begin(self, call):
        self.calls.append(call)
        self.gate.wait()
        if self.fault is not None:
            raise self.fault

    def die(self):
        self.fault = WorkerError("native worker 0 died")

    def _write(self, sequence, token):
        block, place = divmod(sequence.length, BLOCK)
        self.stored[self.kv.tables[sequence.row, block], place] = token
        sequence.length += 1
        if self.states is not None:
            self.states[sequence.row] = _state(self.states[sequence.row, 0], token)

    def _read(self, sequence):
        blocks = self.kv.tables[sequence.row, : -(-sequence.length // BLOCK)]
        tokens = self.stored[blocks].reshape(-1)[: sequence.length].tolist()
        if self.states is not None:
            expected = reduce(_state, tokens, 0.0)
            assert self.states[sequence.row, 0] == expected, (sequence.row, sequence.length)
        return tokens


def _state(before, token):
    """Exact in f32."""
    return (31.0 * before + token + 1) % 65521


def _next(tokens):
    return zlib.crc32(np.array(tokens, np.int32).tobytes()) % VOCAB


def _logits(tokens):
    row = np.zeros(VOCAB, np.float32)
    row[_next(tokens)] = 1.0
    return row
