"""An indexer that chooses pools of positions: all its kernels, as prompts in chunks and as single
tokens, against float64 of the definition.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from dealt import dealt
from kernel_calls import address, filled, floats, guarded, in_turn
from kernel_meanings import index_scores
from prefill_data import bf16, from_bf16, need

from hmc.codegen.arguments import ARGS
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.attention.index import scores_stride
from hmc.ops import OPS, Use

Params = dict[str, int]
SHAPES: list[Params] = [
    {"heads": 5, "dim": 36, "index_topk": 24, "pool": 4},
    {"heads": 32, "dim": 128, "index_topk": 64, "pool": 16},
]
BLOCK, CONTEXT, TOKENS, SLOTS, SLOT, WORKERS = 32, 160, 150, 3, 1, 3


class Case:
    """One sequence in the second of three slots, whose pages lie in no order."""

    def __init__(self, jit: Jit, isa: str, params: Params) -> None:
        need(isa)
        rng = np.random.default_rng(3)
        self.jit, self.isa, self.params = jit, isa, params
        heads, dim, pool = (params[name] for name in ("heads", "dim", "pool"))
        self.inputs = {
            "q": floats(rng, TOKENS, heads * dim),
            "kv": floats(rng, TOKENS, dim),
            "gate": 2 * floats(rng, TOKENS, dim),
            "weights": floats(rng, TOKENS, heads),
        }
        self.ape = guarded(floats(rng, pool, dim))
        pages = CONTEXT // BLOCK
        self.tables = rng.permutation(SLOTS * pages).reshape(SLOTS, -1).astype(np.int32)
        self.kept = {
            state.name: np.full(
                (SLOTS if state.per == "sequence" else SLOTS * CONTEXT, state.width),
                7,
                np.float32 if state.dtype == "f32" else np.uint16,
            )
            for state in OPS["index_pools"].states(params)
        }

    def run(self, first: int, stop: int, many: bool) -> np.ndarray:
        """What tokens [first, stop) chose."""
        tokens, pool = stop - first, self.params["pool"]
        inputs = {name: guarded(each[first:stop].copy()) for name, each in self.inputs.items()}
        most = self.params["index_topk"]
        pools = filled((tokens, most // pool), np.int32)
        chosen = filled((tokens, most + pool), np.int32)
        positions, lasts = np.arange(first, stop, dtype=np.int32), filled((tokens,), np.int32)
        stride = scores_stride(BLOCK // pool, CONTEXT // pool)
        scores = np.zeros((max(tokens, WORKERS), stride), np.float32)
        given: dict[str, np.ndarray | int] = {
            **inputs, "ape": self.ape, "state": self.kept["pools_open"], "pools": pools,
            "pooled": guarded(np.zeros((tokens, self.params["dim"]), np.float32)),
            "rows": self.kept["pools"], "cache": self.kept["pools"], "lasts": lasts,
            "tables": self.tables, "table_stride": self.tables.shape[1], "scores": scores,
            "scratch": scores, "scores_stride": stride, "tokens": tokens,
            "sequence": guarded(np.full(tokens, SLOT, np.int32)),
        }  # fmt: skip
        use = Use(self.isa, 0 if many else 16, BLOCK)
        for spec in OPS["index_pools"].kernels(self.params, {}, use):
            among = spec.op.startswith("index")
            own = given | {
                "positions": lasts if among else positions, "chosen": pools if among else chosen
            }  # fmt: skip
            values: dict[str, int | float] = {}
            for arg in ARGS[spec.op]:
                found = own.get(arg.name, own.get(arg.name.removesuffix("_stride"), 0))
                if isinstance(found, np.ndarray):
                    stride = found.shape[-1]
                    found = stride if arg.name.endswith("_stride") else address(found)
                values[arg.name] = found
            in_turn(self.jit, spec, WORKERS, **values)
        assert (chosen[:, -1] == 77).all()
        return chosen[:, :-1]

    def keys(self) -> np.ndarray:
        """Keys of all whole pools in float64."""
        pool, dim = self.params["pool"], self.params["dim"]
        whole = TOKENS // pool * pool
        gates, values = (
            self.inputs[name][:whole].reshape(-1, pool, dim).astype(np.float64)
            for name in ("gate", "kv")
        )
        raised = np.exp(gates + self.ape)
        found: np.ndarray = (raised * values).sum(1) / raised.sum(1)
        return found

    def check(self, chosen: np.ndarray) -> None:
        """Of each token its own pool as far as it reaches, and the best of those before."""
        pool, heads, keys = self.params["pool"], self.params["heads"], self.keys()
        queries = from_bf16(bf16(self.inputs["q"])).reshape(TOKENS, heads, -1)
        most = self.params["index_topk"] // pool
        for token, row in enumerate(chosen):
            ended, left = divmod(token + 1, pool)
            count = min(ended, most) * pool
            tail = np.arange(ended * pool, token + 1)
            assert (row[count : count + left] == tail).all() and (row[count + left :] == -1).all()
            whole = row[:count].reshape(-1, pool)
            assert (whole == whole[:, :1] + np.arange(pool)).all() and (
                np.diff(row[:count]) > 0
            ).all()
            taken = np.zeros(ended, bool)
            taken[whole[:, 0] // pool] = True
            scores = index_scores(queries[token], self.inputs["weights"][token], keys[:ended])
            if not taken.all():
                near = 0.01 * np.abs(scores).max()  # keys are rounded
                assert scores[taken].min() >= scores[~taken].max() - near, token


@pytest.mark.few(2)
@pytest.mark.parametrize(("params", "isa"), dealt(SHAPES, TIERS))
def test_chunks_and_tokens(jit: Jit, isa: str, params: Params) -> None:
    case = Case(jit, isa, params)
    whole = case.run(0, TOKENS, many=True)
    case.check(whole)
    for bounds in ((0, 1, 6, 70, TOKENS), (0, 33, 66, 120)):
        found = [case.run(*cut, many=True) for cut in pairwise(bounds)]
        assert (np.concatenate(found) == whole[: bounds[-1]]).all()
    for token in range(120, TOKENS):
        assert (case.run(token, token + 1, many=False) == whole[token]).all()
