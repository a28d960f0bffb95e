"""What was asked of a compilation. It stands in the plan, so that whoever plans anew (`hmc tune`)
asks for the same.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from hmc.plan.routing_profile import RoutingProfile

SNAPSHOT_GB = 1.0
"""What snapshots of states may take where nothing was asked."""
_BATCH = 16
"""Sequences that a plan decodes at once at least."""


class Options(BaseModel):
    """Numbers are 0 where nothing was asked: the passes decide.

    `max_context` tokens of one sequence, `max_chunk` of a prefill chunk, `threads` native workers.
    A plan with `dummy_weights` is made from a config alone, cut to `layers`. `vram` bytes of each
    GPU may be used (0: all); the cache holds `concurrency` sequences of whole length at least, or
    `cache_tokens` tokens of all of them; `ring` experts fit into the slots of a streamed prefill.
    Of models that keep states a sequence, or windows in rings, `snapshot_bytes` may hold those of
    prompts, for others that begin alike. `attention` says whose kernels attend on GPUs in decode,
    `lm_head` whether decode steps screen the output matrix by a compact copy where the best logits
    will do ("auto": where it pays). `slo` are goals as the user wrote them, `family` is how to read
    the model, whatever config.json calls it, `profile` recorded routing.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
    max_context: Annotated[int, Field(ge=0)] = 0
    max_chunk: Annotated[int, Field(ge=1)] = 512
    threads: Annotated[int, Field(ge=0)] = 0
    dummy_weights: bool = False
    layers: Annotated[int, Field(ge=0)] = 0
    vram: Annotated[int, Field(ge=0)] = 0
    concurrency: Annotated[int, Field(ge=1)] = 1
    cache_tokens: Annotated[int, Field(ge=0)] = 0
    ring: Annotated[int, Field(ge=0)] = 0
    snapshot_bytes: Annotated[int, Field(ge=0)] = int(SNAPSHOT_GB * 1e9)
    attention: Literal["triton", "flashinfer"] = "triton"
    lm_head: Literal["auto", "stored", "screened"] = "auto"
    slo: str = ""
    family: str = ""
    profile: RoutingProfile | None = None

    @property
    def max_batch(self) -> int:
        """Sequences that may decode at once."""
        return max(_BATCH, self.concurrency)
