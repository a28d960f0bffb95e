"""Attention over a window and compressed rows, as prompts in chunks and as single tokens, against
the block, which computes all of a sequence at once.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from kernel_calls import address, in_turn
from prefill_data import bf16, from_bf16, need

from hmc.blocks import CompressedAttention, Compression, RowIndex
from hmc.codegen.arguments import ARGS
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.attention.index import scores_stride
from hmc.codegen.kernels.compressed.attend import attend_scratch_bytes, most_rows
from hmc.codegen.spec import KernelSpec
from hmc.ops import OPS, Use

BLOCK, CONTEXT, SLOTS, WORKERS = 64, 320, 3, 3
ROPE = (1.0, 0.3, 0.02)
KINDS = {
    "window": CompressedAttention(4, 24, 16, 0.2, sinks="s"),
    "rows": CompressedAttention(
        6, 64, 40, 0.2, sinks="s", compression=Compression(128, False, ROPE, 1e-6)
    ),
    "indexed": CompressedAttention(
        5,
        48,
        16,
        0.2,
        sinks="s",
        compression=Compression(4, True, ROPE, 1e-6),
        index=RowIndex(3, 32, 7),
    ),
}
SLOT = 1


class Sequences:
    """What is kept between calls, and the calls of all kernels of one step, by argument names."""

    def __init__(self, jit: Jit, isa: str, block: CompressedAttention) -> None:
        self.jit, self.isa, self.attrs = jit, isa, dict(block.attributes())
        self.block = block
        self.pages = -(-CONTEXT // BLOCK)
        rng = np.random.default_rng(5)
        self.tables = rng.permutation(SLOTS * self.pages).reshape(SLOTS, -1).astype(np.int32)
        self.kept = {
            state.name: np.full(
                (SLOTS if state.per == "sequence" else SLOTS * self.pages * BLOCK, state.width),
                7,
                np.float32 if state.dtype == "f32" else np.uint16,
            )
            for state in OPS[block.kind].states(self.attrs)
        }
        positions = np.arange(CONTEXT, dtype=np.float32)
        angle = positions[:, None] * np.array(ROPE, np.float32)
        self.cos, self.sin = np.cos(angle), np.sin(angle)
        self.weights = {
            spec.role: np.ascontiguousarray(getattr(block, spec.role).numpy())
            for spec in block.weights("x")
        }

    def call(
        self, inputs: dict[str, np.ndarray], slots: list[int], places: list[int]
    ) -> np.ndarray:
        """y f32 [tokens, heads * head_dim] of tokens at `places` of the sequences in `slots`."""
        tokens, many = len(places), len(set(slots)) < len(slots)
        use = Use(self.isa, 0 if many else 16, BLOCK)
        specs = OPS[self.block.kind].kernels(self.attrs, {}, use)
        last = specs[-1]
        size = scores_stride(BLOCK // 4, CONTEXT // 4)
        window = self.kept["window"]
        gathered = np.zeros((self.block.window + tokens, self.block.head_dim), np.uint16)
        y = np.zeros((tokens, self.block.width), np.float32)
        self.lasts = np.zeros(tokens, np.int32)
        chosen = np.full((tokens, 7), -1, np.int32)
        common: dict[str, object] = {
            **inputs,
            "window": window,
            "window_stride": window.shape[1],
            "gathered": gathered,
            "keys": gathered if many else window,
            "keys_stride": window.shape[1],
            "sequence": np.array(slots, np.int32),
            "positions": np.array(places, np.int32),
            "tables": self.tables,
            "table_stride": self.pages,
            "cos": self.cos,
            "sin": self.sin,
            "chosen": chosen,
            "scores": np.zeros((tokens, size), np.float32),
            "scratch": np.zeros((WORKERS, size), np.float32),
            "lasts": self.lasts,
            "sinks": self.weights["sinks"],
            "y": y,
            "most": most_rows(last, CONTEXT),
            "tokens": tokens,
            "scale": self.block.scale,
            "eps": 1e-6,
        }
        seen: dict[str, int] = {}
        for spec in specs:
            number = seen[spec.op] = seen.get(spec.op, -1) + 1
            own = common | self._rows(spec, number, tokens)
            if spec is last:
                own["scratch"] = np.zeros(WORKERS * attend_scratch_bytes(spec, CONTEXT), np.uint8)
            values = {}
            for arg in ARGS[spec.op]:
                value = own.get(arg.name.removesuffix("_stride")) if arg.name not in own else None
                if arg.name not in own and isinstance(value, np.ndarray):
                    values[arg.name] = value.shape[1]
                else:
                    found = own.get(arg.name, 0)
                    values[arg.name] = address(found) if isinstance(found, np.ndarray) else found
            in_turn(self.jit, spec, WORKERS, **values)
        return y

    def _rows(self, spec: KernelSpec, number: int, tokens: int) -> dict[str, object]:
        index = spec.op.startswith("index") or number == 1
        if "rows" not in self.kept or (index and "index_rows" not in self.kept):
            return {}
        stem, name = ("index_", "index_rows") if index else ("", "rows")
        state = self.kept[f"{name}_open"]
        found: dict[str, object] = {"rows": self.kept[name], "state": state}
        found |= {"ape": self.weights[f"{stem}ape"], "gamma": self.weights[f"{stem}gamma"]}
        found["state_stride"] = state.shape[1]
        if spec.op == "compress":
            kv, gate = ("index_kv", "index_gate") if index else ("rows_kv", "rows_gate")
            found |= {"kv": self.inputs[kv], "gate": self.inputs[gate]}
            self.pooled = np.zeros((tokens, spec["width"]), np.float32)
        if spec.op.startswith("compress"):
            found["pooled"] = self.pooled
        if spec.op.startswith("index"):
            found |= {"q": self.inputs["index_q"], "weights": self.inputs["index_weights"]}
            found |= {"cache": self.kept[name], "positions": self.lasts}
        return found

    def run(self, inputs: dict[str, np.ndarray], slots: list[int], places: list[int]) -> np.ndarray:
        """`call` of rows that are longer than they need be."""
        self.inputs = {name: np.pad(each, ((0, 0), (0, 1))) for name, each in inputs.items()}
        return self.call(self.inputs, slots, places)


def _filled(block: CompressedAttention, seed: int, tokens: int) -> dict[str, np.ndarray]:
    """Inputs of a sequence, keys as bf16 holds them; and the block's weights."""
    rng, attrs = np.random.default_rng(seed), dict(block.attributes())
    if seed == 0:
        for spec in block.weights("x"):
            values = rng.standard_normal(spec.shape, np.float32)
            getattr(block, spec.role).copy_(torch.from_numpy(values))
    roles = [role for role in OPS[block.kind].read(attrs) if role.name != "positions"]
    made = {}
    for role in roles:
        assert role.width is not None
        made[role.name] = rng.standard_normal((tokens, role.width(attrs)), np.float32)
    made["kv"] = from_bf16(bf16(made["kv"])).astype(np.float32)
    return made


def _expected(block: CompressedAttention, inputs: dict[str, np.ndarray]) -> np.ndarray:
    found: torch.Tensor = block(*(torch.from_numpy(each) for each in inputs.values()))
    return found.numpy()


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("isa", TIERS)
def test_chunks_and_tokens_equal_the_block(isa: str, kind: str, jit: Jit) -> None:
    """Chunks of unlike lengths, then tokens of two sequences at once."""
    need(isa)
    block = KINDS[kind]
    tokens = 300 if kind == "rows" else 90
    one = _filled(block, 0, tokens)
    other = _filled(block, 1, 12)
    sequences = Sequences(jit, isa, block)
    made = np.zeros((tokens, block.width), np.float32)
    edges = [0, 3, 4, 67, tokens - 12]
    for first, last in pairwise(edges):
        part = {name: each[first:last] for name, each in one.items()}
        if last - first > 1:
            made[first:last] = sequences.run(part, [SLOT] * (last - first), [*range(first, last)])
        else:
            made[first:last] = sequences.run(part, [SLOT], [first])
    beside = np.zeros((12, block.width), np.float32)
    for step in range(12):
        place = tokens - 12 + step
        both = {
            name: np.concatenate((other[name][step : step + 1], each[place : place + 1]))
            for name, each in one.items()
        }
        beside[step], made[place] = sequences.run(both, [2, SLOT], [step, place])
    for found, expected in ((made, _expected(block, one)), (beside, _expected(block, other))):
        error = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
        assert np.median(error) < 4e-3 and (error > 0.02).mean() < 0.05  # rows are bf16: a near tie
