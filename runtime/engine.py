"""The engine: a plan and its checkpoint in, text or logits out. Text and sampling here, computing
in runtime/executor.py.

with Engine(plan) as engine:
    print(engine.generate("In the beginning", max_new_tokens=40).text)
"""

from __future__ import annotations

from collections.abc import Sequence as Items
from pathlib import Path
from typing import Unpack

import numpy as np

from hmc.closing import Closing
from hmc.plan import Plan
from hmc.runtime.executor import Executor, ExecutorOptions, Logits
from hmc.runtime.tokens.generation import Ends, Generation, Stream, opened
from hmc.runtime.tokens.kept import Kept
from hmc.runtime.tokens.prompts import (
    DEFAULT_NEW_TOKENS,
    Options,
    Prompt,
    prompt_ids,
    sampling_params,
)
from hmc.runtime.tokens.sampler import Sampler
from hmc.runtime.tokens.text import StopStrings, Text


class Engine(Closing):
    """Runs a plan. A context manager; `close` frees everything, and using a closed engine is an
    `ExecutionError`.

    `checkpoint` defaults to the directory the plan was made from. `dummy_weights` runs random
    weights of the plan's shapes. `home` says where weights live: "mapped" (in the page cache),
    "arena" (copied to huge pages) or "shared" (in a memory file). `routing` counts the experts
    chosen. `devices` run what a plan has for GPUs: "auto" and "cuda" are this machine's GPUs,
    "host" plays them on the CPU. A `kv`
    given from outside stays the caller's; `cpus` are the workers' places, instead of `threads`.
    `gpus` gives each of the plan's GPUs a process for the prompts they share; without, one process
    drives all. A rank process that dies ends such prompts with a `WorkerError`. `text` is the
    checkpoint's tokenizer, where it is open already.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: str | Path | None = None,
        *,
        text: Text | None = None,
        **options: Unpack[ExecutorOptions],
    ) -> None:
        """Refuses with the cause named: `PlanMismatchError`, `MachineError`, `CapacityError`,
        `ShardError`.
        """
        directory = Path(checkpoint or plan.checkpoint.path)
        self.plan = plan
        self.text = text or Text.open(directory, plan.limits.max_context)
        self.executor = Executor(plan, directory, **options)

    def logits(self, token_ids: Items[int]) -> Logits:
        """Logits f32 [tokens, vocab] of every token of a prompt, by the prefill path."""
        ids = prompt_ids(token_ids, self.text, self.plan)
        with opened(self.executor) as sequence:
            parts = [part.copy() for part in self.executor.prefill(sequence, ids, every=True)]
        return np.concatenate(parts)

    def decode_logits(self, token_ids: Items[int]) -> Logits:
        """The same token by token, by the decode path."""
        ids = prompt_ids(token_ids, self.text, self.plan)
        with opened(self.executor) as sequence:
            rows = [
                self.executor.decode([sequence], ids[i : i + 1]).copy() for i in range(len(ids))
            ]
        return np.concatenate(rows)

    def generate(self, prompt: Prompt, **options: Unpack[Options]) -> Generation:
        """Continue a text, a list of token ids, or a chat. Sampling arguments that are None or left
        out come from generation_config.json, else greedy.

        Ctrl-C ends it with what there is, `finish_reason` "cancelled". Raises `UsageError` for an
        empty prompt or a bad argument, `ContextLengthError` for a prompt longer than the context.
        """
        with self.stream(prompt, **options) as stream:
            for _ in stream:
                pass
        return stream.result

    def stream(
        self,
        prompt: Prompt,
        *,
        kept: Kept | None = None,
        shown: Items[str] = (),
        **options: Unpack[Options],
    ) -> Stream:
        """As `generate`, token by token: iterate over `Piece`s, then read `.result`. What `kept`
        holds of the prompt is not computed again; of special tokens those of `shown` are in texts.
        """
        params = sampling_params(self.text, options)
        params.check_tokens(self.plan.model.vocab)
        ids = prompt_ids(prompt, self.text, self.plan)
        most = options.get("max_new_tokens", DEFAULT_NEW_TOKENS)
        ends = Ends(most, self.eos_token_ids, StopStrings(options.get("stop")))
        text = self.text.showing(shown) if self.text and shown else self.text
        return Stream(self.executor, text, ids, Sampler(params, ids.tolist()), ends, kept)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the checkpoint's, else the plan's."""
        return (self.text.eos_token_ids if self.text else ()) or self.plan.model.eos_token_ids

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        self.executor.close()
