"""Service goals: how they are written."""

from __future__ import annotations

import re

from hmc.errors import UsageError
from hmc.plan import Goals

_GOAL = re.compile(
    r"(ttft=(?P<seconds>\d+(\.\d+)?)(?P<unit>ms|s)?|tps=(?P<rate>\d+(\.\d+)?))"
    r"(@(?P<tokens>\d+)(?P<k>[kK])?)?"
)
_SHORT = 1024
"""Tokens of context at which a rate is asked for that names none."""


def parse_goals(text: str, concurrency: int = 1, *, lengths: bool = True) -> Goals:
    """Goals such as "ttft=30s@32k,tps=20" or "tps=20@32k": seconds to the first token of a prompt
    of 32 x 1024 tokens, tokens a second of each of `concurrency` sequences at a context (1,024
    tokens if none is named); without `lengths`, of all prompts and contexts: "ttft=30s,tps=20".
    `UsageError` for another form.
    """
    found: dict[str, float | int] = {"concurrency": concurrency}
    for part in filter(None, (each.strip() for each in text.split(","))):
        match = _GOAL.fullmatch(part)
        named = match is not None and match["tokens"] is not None
        if match is None or (named if not lengths else match["seconds"] and not named):
            raise UsageError(f"--slo {part}: write goals as ttft=30s{'@32k' * lengths},tps=20")
        tokens = int(match["tokens"] or _SHORT) * (1024 if match["k"] else 1)
        if match["seconds"]:
            seconds = float(match["seconds"]) / (1000 if match["unit"] == "ms" else 1)
            found |= {"ttft_seconds": seconds, "ttft_prompt": tokens}
        else:
            found |= {"tokens_per_second": float(match["rate"]), "tokens_context": tokens}
    return Goals.model_validate(found)
