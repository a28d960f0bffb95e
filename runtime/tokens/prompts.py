"""What a model is asked, checked and made into token ids: needs the plan and the tokenizer, not the
weights, so a wrong question is refused before they are opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from hmc.errors import UsageError
from hmc.plan import Plan
from hmc.runtime.tokens.requests import token_ids
from hmc.runtime.tokens.sampler import SamplingParams
from hmc.runtime.tokens.text import Text

Prompt = str | Items[int] | npt.NDArray[np.int32] | Items[dict[str, Any]]
"""Text, token ids, or the messages of a chat ({"role", "content"} each)."""
DEFAULT_NEW_TOKENS = 256


class Options(TypedDict, total=False):
    """How to continue a prompt: the arguments of `SamplingParams`, and what ends the answer."""

    max_new_tokens: int
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    logit_bias: Mapping[int, float] | None
    seed: int | None
    stop: str | Items[str] | None


def prompt_ids(prompt: Prompt, text: Text | None, plan: Plan) -> npt.NDArray[np.int32]:
    """`prompt` as i32 [tokens]; a chat through the model's template.

    Raises `UsageError` for an empty prompt, ids outside the vocabulary, and text or a chat without
    tokenizer or template; `ContextLengthError` for more tokens than the plan's context.
    """
    if isinstance(prompt, str):
        if text is None:
            raise UsageError("this checkpoint has no tokenizer: give token ids instead of text")
        if not prompt:
            raise UsageError("the prompt is empty: give at least one character")
        ids: Items[int] | npt.NDArray[np.int32] = text.encode(prompt)
    elif len(prompt) and isinstance(prompt[0], dict):
        if text is None:
            raise UsageError("this checkpoint has no tokenizer: give token ids instead of a chat")
        ids = text.encode_chat(prompt)  # type: ignore[arg-type]
    else:
        ids = prompt  # type: ignore[assignment]
    return token_ids(ids, plan.model.vocab, plan.limits.max_context)


def sampling_params(text: Text | None, options: Mapping[str, Any]) -> SamplingParams:
    """`SamplingParams.resolve` of `options`, those of `Options`, over the checkpoint's
    generation_config.json.

    Raises `UsageError` for a bad value, for less than one new token, and for stop strings where
    there is no text to stop at.
    """
    explicit = dict(options)
    most = explicit.pop("max_new_tokens", DEFAULT_NEW_TOKENS)
    if isinstance(most, bool) or not isinstance(most, int) or most < 1:
        raise UsageError(f"max_new_tokens={most}: must be a whole number >= 1")
    if explicit.pop("stop", None) and text is None:
        raise UsageError("stop: this checkpoint has no tokenizer, so there is no text to stop at")
    return SamplingParams.resolve(explicit, text.generation_config if text else {})
