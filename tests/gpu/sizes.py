"""How much the GPU check measures, and what its sections share: the machine, a folder, and weights
of one model at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from gpu.models import FAMILIES, FORMATS, cut, reduced
from gpu.plans import Model
from hmc.bench.probe import QUICK, Effort
from hmc.machine.model import Machine
from hmc.plan import Plan
from hmc.runtime.executor import Executor
from hmc.runtime.weights.store import WeightStore

Choice = Literal["cuda", "host"]


@dataclass(frozen=True)
class Sizes:
    """Without `layers`, models are the reduced ones; else published shapes with so many layers at
    most and `weights` bytes. `rings` end with a layer's experts; `product` are rows, columns and
    tokens of the FP8 products, `copy` the bytes of a plain copy, `played` those of a GPU that the
    CPU plays, `parity` the models and formats compared.
    """

    prompts: tuple[int, ...]
    ring_prompt: int
    chunk: int
    decode_steps: int
    repetitions: int
    product: tuple[int, int, int]
    copy: int
    effort: Effort
    layers: int = 0
    weights: float = 0.0
    played: int = 1 << 30
    parity: tuple[tuple[str, str], ...] = tuple((f, q) for f in FAMILIES for q in FORMATS)


FULL = Sizes(
    prompts=(2048, 8192, 32768),
    ring_prompt=8192,
    chunk=512,
    decode_steps=32,
    repetitions=3,
    product=(2048, 7168, 512),
    copy=1 << 30,
    effort=QUICK,
    layers=8,
    weights=40e9,
)
SMALL = Sizes(
    prompts=(128, 256),
    ring_prompt=256,
    chunk=64,
    decode_steps=6,
    repetitions=2,
    product=(256, 512, 32),
    copy=64 << 20,
    effort=Effort(2, 64, 128, (1, 4), 32, 4 << 20),
)


class Bench:
    """What the sections share; `close` gives its memory back."""

    def __init__(self, machine: Machine, sizes: Sizes, devices: Choice, folder: Path) -> None:
        """`machine` has the rates of this run and one GPU."""
        self.machine, self.sizes, self.devices, self.folder = machine, sizes, devices, folder
        self._directories: dict[str, Path] = {}
        self._store: tuple[str, WeightStore] | None = None

    @property
    def device(self) -> torch.device:
        """Where PyTorch computes."""
        return torch.device("cuda", 0) if self.devices == "cuda" else torch.device("cpu")

    def model(self, name: str, context: int) -> Model:
        """A model with dummy weights, for sequences of up to `context` tokens."""
        if name not in self._directories:
            self._directories[name] = (
                cut(self.folder, name, self.sizes.layers, self.machine, self.sizes.weights)
                if self.sizes.layers
                else reduced(self.folder, name)
            )
        return Model(self._directories[name], self.machine, context, self.sizes.chunk, True)

    @contextmanager
    def running(self, name: str, plan: Plan) -> Iterator[Executor]:
        """An executor of a plan of a model with dummy weights. These are made once, for as long as
        no other model is asked for."""
        if self._store is None or self._store[0] != name:
            self.close()
            self._store = name, WeightStore.open(plan, None, dummy=True, home="shared")
        executor = Executor(plan, None, store=self._store[1], devices=self.devices)
        try:
            yield executor
        finally:
            executor.close()

    def close(self) -> None:
        """Give the weights back."""
        if self._store is not None:
            self._store[1].close()
        self._store = None


def token_ids(count: int, vocab: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Random token ids, i32 [count]."""
    return np.random.default_rng(seed).integers(2, vocab, count, np.int32)
