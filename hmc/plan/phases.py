"""Which phase computes a prompt or a decode step, and how its calls are cut: pure functions of the
plan, which the runtime follows and every prediction assumes.

The policy, as far as the phases of a plan allow it:
    * the plan's switch-over points choose the phase: for a prompt by the tokens left to compute,
      for a decode step by the number of sequences. Without switches: `prefill.host` and `decode`.
    * a prompt of which every token's logits are wanted, and one with too few tokens for the GPUs
      that share a phase, run in `prefill.host`.
    * a prompt that would stream its weights while others decode does so beside them, where the plan
      has a phase for that (`prefill.beside`) and the caller can run the two at the same time (the
      scheduler can: runtime/phases/beside.py). Meanwhile no other prompt streams: such phases share
      memory. Where nobody decodes, or decode would have to wait, `prefill.stream` is over sooner:
      it has all GPUs.
    * a prompt in `prefill.host` runs in chunks, in turns with others
      (runtime/batching/turns.py). Alone, they are as long as the plan allows; while
      others decode, a quarter of it, and after each chunk every running sequence gets a token. So
      nobody waits for more than a quarter chunk between two tokens, however long the prompt is.
      A chunk reads nearly all experts whatever its length, so much shorter ones would make the
      prompt late without making the others faster.
    * with a prefill process beside the scheduler, it takes the prompts in `prefill.host` that are
      longer than a whole chunk and of which the last logits alone are wanted. Shorter ones would
      not gain: beside decode they delay every other by four quarter chunks at most.
    * any other prefill phase streams the weights once for all it is given: such a prompt goes in
      one call as far as the phase takes it.
    * where layers keep states a sequence, chunks end where a snapshot of them is wanted
      (`KVLayout.stops`), and are as equal up to there as ends of pages allow: kernels that compute
      tokens in blocks then see the same blocks, however a prompt is cut.
    * a phase that streams the weights stops at the last of these alone, and what little is left is
      a prompt of its own: every call streams all.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from hmc.plan.model import Plan
from hmc.plan.states import Stop

PREFILL, STREAM, CHOSEN = "prefill.host", "prefill.stream", "prefill.stream.chosen"
"""Prompts: in chunks, each layer's weights streamed once, and those of chosen experts alone."""
BESIDE = "prefill.beside"
"""Streams through the last GPU alone, for a prompt that comes while gpu0 and the CPU decode."""
DECODE, DUAL = "decode", "decode.dual"
_BESIDE_DECODE = 4


def prefill_phase(
    plan: Plan, tokens: int, *, every: bool = False, decoding: int = 0, beside: bool = False
) -> str:
    """The phase for a prompt of which `tokens` are left to compute, `every` one's logits wanted or
    the last one's alone, while `decoding` sequences decode; `beside` says that the caller computes
    a prompt and decode steps at the same time.
    """
    found = PREFILL if every else _phase(plan, "prefill", tokens, PREFILL)
    if found == PREFILL:
        return found
    if beside and decoding and any(phase.name == BESIDE for phase in plan.phases):
        return BESIDE
    return found if tokens >= 2 * plan.phase(found).ranks else PREFILL


def in_own_process(plan: Plan, phase: str, tokens: int, *, every: bool) -> bool:
    """Whether a prefill process, where there is one, computes a prompt of that `phase` of which
    `tokens` are left.
    """
    return phase == PREFILL and not every and tokens > plan.limits.max_chunk


def decode_phase(plan: Plan, batch: int) -> str:
    """The phase for a decode step of `batch` sequences."""
    return _phase(plan, "decode", batch, DECODE)


def chunk_tokens(
    plan: Plan, phase: str, left: int, decoding: int, past: int = 0, stops: Sequence[Stop] = ()
) -> int:
    """How many of the `left` tokens of a prompt, `past` of which are in the cache, the next call
    takes while `decoding` sequences decode; chunks up to the next of `stops`, or the end, come out
    equal, since a short last one would read all weights for few tokens.
    """
    most, block = plan.phase(phase).max_tokens, plan.kv.block
    if decoding and phase == PREFILL:
        most = min(most, max(block, plan.limits.max_chunk // _BESIDE_DECODE))
    if phase != PREFILL:
        stops = stops[-1:]
    return _next(left, most, past, stops, plan.kv.aligned)


def prompt_calls(
    most: int, tokens: int, stops: Sequence[Stop] = (), aligned: int = 1
) -> list[tuple[int, int]]:
    """(first token, tokens) of every call in which a phase that takes up to `most` computes a
    prompt that is alone and has these stops; calls end at multiples of `aligned` tokens."""
    calls, first = [], 0
    while first < tokens:
        count = _next(tokens - first, most, first, stops, aligned)
        calls.append((first, count))
        first += count
    return calls


def prompt_stops(plan: Plan, phase: str, tokens: int) -> tuple[Stop, ...]:
    """Where calls of a phase end for the sake of snapshots, of a prompt that is new."""
    return plan.kv.stops(0, tokens) if phase == PREFILL else ()


def decode_calls(most: int, batch: int) -> list[tuple[int, int]]:
    """[first, last) of the sequences in every call of a decode step, whose phase takes up to
    `most`."""
    calls = -(-batch // most)
    edges = [batch * number // calls for number in range(calls + 1)]
    return list(pairwise(edges))


def _next(left: int, most: int, past: int, stops: Sequence[Stop], aligned: int) -> int:
    """Tokens of the next call of a prompt of which `left` are left after `past`."""
    goal = min((s.tokens - past for s in stops if s.tokens > past), default=left)
    end = -(-(past + _even(goal, most)) // aligned) * aligned
    if end - past > min(goal, most):
        end = past + goal if goal <= most else end - aligned
    return end - past if end > past else min(goal, most)


def _even(left: int, most: int) -> int:
    """The next call's share of what is left, of as few equal calls as `most` allows."""
    return -(-left // -(-left // most))


def _phase(plan: Plan, kind: Literal["prefill", "decode"], tokens: int, default: str) -> str:
    points = [s for s in plan.switches if s.kind == kind and s.tokens <= tokens]
    return max(points, key=lambda s: s.tokens).phase if points else default
