"""What the temporaries of one op may take on a device, and rows in blocks that keep to it.

A call may have tens of thousands of rows, and an op makes several f32 tensors of each. Ops work
through their rows in blocks of as many as fit: one block, at no cost, for all but long prompts.
Estimates count the tensors that live at once; the allocator keeps more than lives, so the plan's
ledger counts twice `BYTES` for each GPU, and what latent attention makes of the whole context.
What a block names is to be local to a function: a name of the loop would keep the tensors of one
block while the next makes its own.
"""

from __future__ import annotations

from collections.abc import Iterator

from hmc.plan.memory import SCRATCH

BYTES = SCRATCH // 2
"""Bytes of an op's temporaries on one device; read at every call."""


def quarter() -> int:
    """For an op with several kinds of temporaries at once, what each may take, in bytes."""
    return BYTES // 4


def blocks(first: int, last: int, row_bytes: int, budget: int = 0) -> Iterator[slice]:
    """Rows [first, last) as slices of at least one row and at most `budget` bytes (default `BYTES`)
    at `row_bytes` a row. All but the last are equally long, so that each finds the memory of the
    one before.
    """
    rows = last - first
    limit = max(1, (budget or BYTES) // max(1, row_bytes))
    step = -(-rows // -(-rows // limit)) if rows > limit else limit
    for start in range(first, last, step):
        yield slice(start, min(last, start + step))
