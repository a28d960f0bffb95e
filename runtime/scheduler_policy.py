"""Which phase computes a prompt or a decode step, and how much of a prompt goes into one chunk.

The policy, as far as the phases of a plan allow it:
    * the plan's switch-over points choose the phase: for a prompt by the tokens left to compute,
      for a decode step by the number of sequences. Without switches: `prefill.host` and `decode`.
    * a prompt in `prefill.host` runs in chunks. Alone, they are as long as the plan allows; while
      others decode, a quarter of it, and after each chunk every running sequence gets a token. So
      nobody waits for more than a quarter chunk between two tokens, however long the prompt is.
      A chunk reads nearly all experts whatever its length, so much shorter ones would make the
      prompt late without making the others faster.
    * any other prefill phase streams the weights once for all it is given: such a prompt goes in
      one call as far as the phase takes it.
"""

from __future__ import annotations

from typing import Literal

from hmc.plan import Plan
from hmc.runtime.executor import DECODE, PREFILL

_BESIDE_DECODE = 4


def prefill_phase(plan: Plan, tokens: int) -> str:
    """The phase for a prompt of which `tokens` are left to compute."""
    return _phase(plan, "prefill", tokens, PREFILL)


def decode_phase(plan: Plan, batch: int) -> str:
    """The phase for a decode step of `batch` sequences."""
    return _phase(plan, "decode", batch, DECODE)


def chunk_tokens(plan: Plan, phase: str, left: int, decoding: int) -> int:
    """How many of the `left` tokens of a prompt the next call takes while `decoding` sequences
    decode; chunks come out equal, since a short last one would read all weights for few tokens.
    """
    most = plan.phase(phase).max_tokens
    if decoding and phase == PREFILL:
        most = min(most, max(plan.kv.block, plan.limits.max_chunk // _BESIDE_DECODE))
    chunks = -(-left // most)
    return -(-left // chunks)


def _phase(plan: Plan, kind: Literal["prefill", "decode"], tokens: int, default: str) -> str:
    points = [s for s in plan.switches if s.kind == kind and s.tokens <= tokens]
    return max(points, key=lambda s: s.tokens).phase if points else default
