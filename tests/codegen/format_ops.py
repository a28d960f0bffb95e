"""Every matmul, called with weights of any format: small and odd sizes, one input for all."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from format_rows import Made, made
from kernel_calls import address, filled, guarded, in_turn
from prefill_data import activations, bf16, from_bf16

from hmc.codegen.checks import check_spec
from hmc.codegen.expr import SWIGLU
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.attention.prefill_form import prefill_scratch_bytes
from hmc.codegen.kernels.matmul.experts import scratch_bytes
from hmc.codegen.panel.tiling import panel_scratch_bytes
from hmc.codegen.spec import KernelSpec
from hmc.formats import FORMATS, Format

OPS = (
    "linear", "gemm", "gate_up", "experts_gate_up", "experts_down", "grouped_gate_up",
    "grouped_down", "mla_absorb", "mla_up", "mla_prefill",
)  # fmt: skip
_NATIVE_GROUPS = ("linear", "gemm", "experts_down", "grouped_gate_up", "mla_absorb", "mla_prefill")
EXPERTS, TOP_K = 3, 2
LATENT = {"heads": 2, "nope": 14, "rope": 6, "v_dim": 11, "block": 8}
_ROWS = LATENT["heads"] * (LATENT["nope"] + LATENT["v_dim"])


def columns(row: Format, op: str = "") -> tuple[int, int]:
    """K and the group of a weight: as odd as the format takes. Groups are such as native decoders
    know, but for a few ops.
    """
    if row.codes.block[1]:
        return max(224, 2 * row.codes.block[0]), 0
    if row.grouped:
        return (160, 32) if op in _NATIVE_GROUPS else (120, 40)
    return 133, 0


def matrices(op: str, row: Format, seed: int = 1) -> list[Made]:
    """What `op` multiplies by: gate, up and down of each expert for experts."""
    rng, (k, group) = np.random.default_rng(seed), columns(row, op)
    count = {"linear": 1, "gemm": 1, "gate_up": 2}.get(op, 1 if op in _LATENT else 3 * EXPERTS)
    rows = _ROWS if op in _LATENT else 37
    return [made(rng, row, rows, k, group, keep=guarded) for _ in range(count)]


_LATENT = ("mla_absorb", "mla_up", "mla_prefill")


def plain(weights: list[Made]) -> list[Made]:
    """The same as F32."""
    found = []
    for each in weights:
        values = guarded(each.values)
        found.append(Made((values,), values, {}, np.zeros(0, np.int64)))
    return found


def near(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether results, f32 or bf16 bits, are those of the same weights in another arithmetic."""
    values, exact = (from_bf16(y) if y.dtype == np.uint16 else y for y in (found, expected))
    step = 2.0**-7 if found.dtype == np.uint16 else 0.0  # both are rounded
    limit = 3e-4 * np.sqrt(np.mean(exact**2)) + step * np.abs(exact)
    return bool((np.abs(values - exact) <= limit).all())


@dataclass(frozen=True)
class Call:
    """An op on a tier with weights of a format; all have K columns."""

    jit: Jit
    op: str
    isa: str
    row: Format
    weights: list[Made]

    def run(self) -> np.ndarray:
        """The result as stored."""
        few = self.op in ("linear", "gate_up", "experts_gate_up", "experts_down")
        tokens = 3 if few or self.op in _LATENT else 19
        if self.op in _LATENT:
            return self._latent(tokens)
        return self._routed(tokens) if self.op[:4] in ("expe", "grou") else self._dense(tokens)

    @property
    def _k(self) -> int:
        return self.weights[0].values.shape[1]

    @property
    def _n(self) -> int:
        return self.weights[0].values.shape[0]

    def _spec(self, out: str = "f32", **sizes: int) -> KernelSpec:
        tile = {"tokens": 5} if self.op == "gemm" or "grouped" in self.op else {}
        expr = SWIGLU if "gate_up" in self.op else ""
        spec = KernelSpec.of(self.op, self.isa, weight=self.row.name, out=out, tile=tile, expr=expr)
        params = tuple(sorted((sizes | self.weights[0].params).items()))
        spec = replace(spec, params=params)
        check_spec(spec)
        return spec

    def _small(self, x: np.ndarray) -> np.ndarray:
        """Activations (bf16 bits) by 2^-8 where products go through an expression that is steep."""
        exponents = 8 << 7 if "gate_up" in self.op else 0
        return guarded(np.maximum(x & 0x7FFF, exponents) - exponents | x & 0x8000)

    def _dense(self, tokens: int) -> np.ndarray:
        rows, k, many = self._n, self._k, self.op == "gemm"
        gated = self.op == "gate_up"
        spec = self._spec("bf16" if gated else "f32", k=k, **({} if many else {"tokens": tokens}))
        x = self._small(activations(np.random.default_rng(2), tokens, k, k))
        y = filled((tokens, rows), np.uint16 if gated else np.float32)
        args = {"x": address(x), "x_stride": k, "y": address(y), "y_stride": rows, "rows": rows,
                "tokens": tokens}  # fmt: skip
        names = [("gate", "gate_scale"), ("up", "up_scale")] if gated else [("w", "scale")]
        for (w, scale), each in zip(names, self.weights, strict=True):
            args |= {w: each.codes, scale: each.beside}
        args |= {"gate_bias": 0, "up_bias": 0} if gated else {"bias": 0}
        if many:
            scratch = np.zeros(2 * panel_scratch_bytes(spec), np.uint8)
            args |= {"gather": 0, "scratch": address(scratch)}
        in_turn(self.jit, spec, 2, **args)
        return y

    def _routed(self, tokens: int) -> np.ndarray:
        n, k, many = self._n, self._k, "grouped" in self.op
        into = self.op.endswith("gate_up")
        sizes = {"k": k, "n": n, "top_k": TOP_K, "experts": EXPERTS}
        spec = self._spec("bf16" if into else "f32", **sizes, **({} if many else {"tokens": 3}))
        rng = np.random.default_rng(3)
        ids = np.stack([rng.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)]).astype(np.int32)
        x = self._small(activations(rng, tokens if into else tokens * TOP_K, k, k))
        routing = rng.uniform(0.1, 1, (tokens, TOP_K)).astype(np.float32)
        table = np.array([[each.codes, each.beside] for each in self.weights], np.int64)
        act, y = filled((tokens * TOP_K, n), np.uint16), filled((tokens, n), np.float32)
        args = {"table": address(table), "routing": address(routing)}
        if many:
            slots = np.argsort(ids.reshape(-1), kind="stable").astype(np.int32)
            counts = np.bincount(ids.reshape(-1), minlength=EXPERTS)
            offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
            args |= {"slots": address(slots), "offsets": address(offsets)}
        else:
            args |= {"ids": address(ids), **({"teams": 0} if into else {})}
        if into:
            args |= {"x": address(x), "x_stride": k, "act": address(act), "gate_bias": 0,
                     "up_bias": 0}  # fmt: skip
        else:
            args |= {"act": address(x), "y": address(y), "y_stride": n, "bias": 0}
        if not (many and into):
            args["tokens"] = tokens
        size = 2 * panel_scratch_bytes(spec) if many else scratch_bytes(spec)
        scratch = np.zeros(max(1, size), np.uint8)
        in_turn(self.jit, spec, 1, **args, scratch=address(scratch))
        return act if into else y

    def _latent(self, tokens: int) -> np.ndarray:
        heads, nope, rope, v_dim, block = LATENT.values()
        rank, rng = self._k, np.random.default_rng(4)
        lifted = self.op == "mla_prefill"
        sizes = LATENT | {"rank": rank} | ({} if lifted else {"tokens": tokens})
        spec = self._spec("f32" if self.op == "mla_absorb" else "bf16", **sizes)
        (w,) = self.weights
        q = guarded(rng.standard_normal((tokens, heads, nope + rope), dtype=np.float32))
        args = {"w": w.codes, "tokens": tokens}
        y = filled((tokens, heads * v_dim), np.uint16)
        result = {"y": address(y), "y_stride": heads * v_dim}
        queries = {"q": address(q), "q_stride": heads * (nope + rope)}
        if self.op == "mla_absorb":
            y = filled((tokens, heads, rank), np.float32)
            args |= queries | {"scale": w.beside, "q_latent": address(y)}
        elif self.op == "mla_up":
            latent = guarded(bf16(rng.standard_normal((tokens, heads, rank))))
            args |= result | {"scale": w.beside, "y_latent": address(latent)}
        else:
            cache = guarded(bf16(rng.standard_normal((2, block, rank + rope))))
            tables, sequence = np.array([[1, 0]], np.int32), np.zeros(tokens, np.int32)
            positions = np.arange(7, 7 + tokens, dtype=np.int32)
            scratch = np.zeros(2 * prefill_scratch_bytes(spec), np.uint8)
            args |= queries | result
            args |= {"cache": address(cache), "w_scale": w.beside, "tables": address(tables),
                     "table_stride": 2, "sequence": address(sequence), "scale": 2.0**-7,
                     "positions": address(positions), "scratch": address(scratch),
                     "growth": 0.0}  # fmt: skip
        in_turn(self.jit, spec, 2, **args)
        return y


F32 = FORMATS["f32"]
