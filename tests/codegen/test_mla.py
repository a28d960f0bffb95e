"""Latent attention kernels against float64, each fed with what the one before it really wrote.

Bounds: absorbing 1e-6 of the sum of magnitudes (f32 sums); latents the bf16 rounding of y_latent
and, on avx512_bf16, 1 % of sum p |c| (queries and probabilities enter as bf16); the last projection
half a bf16 step and 1e-6.
"""

from __future__ import annotations

import numpy as np
import pytest
from attention_options import LATENT, of_heads, option_args, option_spec
from dealt import dealt
from kernel_calls import address, bf16, filled, floats, from_bf16, guarded, in_turn, spec_of
from kernel_meanings import NO_OPTIONS, Options, kv_append, mla_absorb, mla_attention, mla_up
from paged import Paged
from prefill_data import Stored, need, stored

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.attention.attend import attention_scratch_bytes
from hmc.codegen.spec import WeightFormat

Params = dict[str, int]
FORMATS: list[WeightFormat] = ["fp8", "bf16", "fp16", "f32"]
SHAPES: list[Params] = [
    {"heads": 16, "nope": 128, "rope": 64, "v_dim": 128, "rank": 512, "block": 32, "tokens": 16},
    # Scale blocks straddle heads, and no width is a whole number of vectors.
    {"heads": 5, "nope": 29, "rope": 10, "v_dim": 45, "rank": 202, "block": 10, "tokens": 16},
]


def values_of(w: Stored, params: Params) -> np.ndarray:
    """f64 [heads, nope + v_dim, rank]."""
    return w.values.reshape(params["heads"], params["nope"] + params["v_dim"], params["rank"])


def weights(rng: np.random.Generator, weight: WeightFormat, params: Params) -> Stored:
    """kv_b as stored, guarded."""
    w = stored(rng, weight, params["heads"] * (params["nope"] + params["v_dim"]), params["rank"])
    return Stored(guarded(w.data), guarded(w.scale), w.values)


def absorb(
    jit: Jit, isa: str, weight: WeightFormat, params: Params, q: np.ndarray, w: Stored, workers: int
) -> np.ndarray:
    """q_latent [tokens, heads, rank]."""
    y = filled((len(q), params["heads"], params["rank"]), np.float32)
    in_turn(
        jit, spec_of("mla_absorb", isa, params, weight), workers, q=address(q),
        q_stride=q.shape[1], w=address(w.data), scale=address(w.scale), q_latent=address(y),
        tokens=len(q),
    )  # fmt: skip
    return y


def up(
    jit: Jit, isa: str, weight: WeightFormat, params: Params, x: np.ndarray, w: Stored, workers: int
) -> np.ndarray:
    """y bits [tokens, heads, v_dim]."""
    columns = params["heads"] * params["v_dim"]
    y = filled((len(x), columns + 5), np.uint16)
    in_turn(
        jit, spec_of("mla_up", isa, params, weight), workers,
        y_latent=address(x), w=address(w.data), scale=address(w.scale), y=address(y),
        y_stride=columns + 5, tokens=len(x),
    )  # fmt: skip
    assert (y[:, columns:] == 77).all()
    return y[:, :columns].reshape(len(x), params["heads"], params["v_dim"])


def query(rng: np.random.Generator, params: Params, tokens: int) -> np.ndarray:
    """f32 [tokens, heads * (nope + rope) + 3]."""
    return floats(rng, tokens, params["heads"] * (params["nope"] + params["rope"]) + 3)


def heads_of(q: np.ndarray, params: Params) -> np.ndarray:
    """[tokens, heads, nope + rope]."""
    return q[:, :-3].reshape(len(q), params["heads"], -1)


@pytest.mark.parametrize(("isa", "weight", "params"), dealt(TIERS, FORMATS, SHAPES))
def test_absorb(jit: Jit, isa: str, weight: WeightFormat, params: Params) -> None:
    need(isa)
    rng = np.random.default_rng(1)
    w = weights(rng, weight, params)
    values = values_of(w, params)
    for tokens in (1, 3, 16):
        q = query(rng, params, tokens)
        y = absorb(jit, isa, weight, params, q, w, 1)
        rows = heads_of(q, params)
        bound = mla_absorb(np.abs(rows), np.abs(values), params["nope"])
        assert (np.abs(y - mla_absorb(rows, values, params["nope"])) <= 1e-6 * bound).all()
        for workers in (2, 4, 31):
            assert (absorb(jit, isa, weight, params, q, w, workers) == y).all()
        alone = absorb(jit, isa, weight, params, guarded(q[-1:]), w, 2)
        assert (alone[0] == y[-1]).all()


@pytest.mark.few(2)
@pytest.mark.parametrize(("isa", "weight", "params"), dealt(TIERS, FORMATS, SHAPES))
def test_up(jit: Jit, isa: str, weight: WeightFormat, params: Params) -> None:
    need(isa)
    rng = np.random.default_rng(2)
    w = weights(rng, weight, params)
    values = values_of(w, params)
    for tokens in (1, 3, 16):
        x = guarded(bf16(rng.standard_normal((tokens, params["heads"], params["rank"]))))
        y = up(jit, isa, weight, params, x, w, 1)
        reference = mla_up(from_bf16(x), values, params["nope"])
        bound = mla_up(np.abs(from_bf16(x)), np.abs(values), params["nope"])
        error = np.abs(from_bf16(y) - reference)
        assert (error <= 2.0**-8 * np.abs(reference) + 2e-6 * bound).all()
        for workers in (2, 4, 31):
            assert (up(jit, isa, weight, params, x, w, workers) == y).all()
        alone = up(jit, isa, weight, params, guarded(x[-1:]), w, 2)
        assert (alone[0] == y[-1]).all()


def attend(
    jit: Jit,
    isa: str,
    params: Params,
    paged: Paged,
    q: np.ndarray,
    latent: np.ndarray,
    cache: np.ndarray,
    scale: float,
    workers: int,
    options: Options = NO_OPTIONS,
) -> np.ndarray:
    """y_latent bits [tokens, heads, rank]."""
    y = filled(latent.shape, np.uint16)
    spec = option_spec("mla_attention", isa, params, options)
    size = attention_scratch_bytes(spec, len(q), paged.max_context)
    scratch = guarded(np.full(size, 0xFF, np.uint8))
    common = {
        "positions": address(paged.positions), "y_latent": address(y), "tokens": len(q),
        "scratch": address(scratch),
    }  # fmt: skip
    in_turn(
        jit, spec, workers, **common, q=address(q), q_stride=q.shape[1], q_latent=address(latent),
        cache=address(cache), tables=address(paged.tables), table_stride=paged.tables.shape[1],
        sequence=address(paged.sequence), scale=scale, growth=options.growth,
    )  # fmt: skip
    join = option_spec("mla_attention_join", isa, params, options)
    in_turn(jit, join, workers, **common, **option_args(join.op, options))
    return y


@pytest.mark.few(3)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(
    ("params", "options"),
    [(SHAPES[0], NO_OPTIONS), (SHAPES[1], NO_OPTIONS), (SHAPES[1], LATENT)],
    ids=["deepseek", "ragged", "options"],
)
def test_attention(jit: Jit, isa: str, params: Params, options: Options) -> None:
    need(isa)
    options = of_heads(options, params["heads"])
    rng = np.random.default_rng(3)
    places = [(0, 298), (1, 0), (2, 255), (0, 299), (3, 256), (4, -1)]
    paged = Paged.of(rng, params["block"], places)
    bits, values = paged.rows(rng, params["rank"] + params["rope"])
    cache = guarded(bits)
    q = query(rng, params, len(places))
    latent = floats(rng, len(places), params["heads"], params["rank"])
    scale = 2 * (params["rank"] + params["rope"]) ** -0.5
    y = attend(jit, isa, params, paged, q, latent, cache, scale, 1, options)
    where = (paged.tables, paged.sequence, paged.positions)
    reference = mla_attention(heads_of(q, params), latent, values, *where, scale, options)
    error = np.abs(from_bf16(y) - reference)
    # sum p |c| is about 0.8 here: the mean magnitude of a normal number.
    rounding = 0.01 if isa == "avx512_bf16" else 1e-5
    assert (error <= 2.0**-8 * np.abs(reference) + rounding * 0.8).all()
    assert (y[5] == 0).all()
    for workers in (2, 4, 17):
        again = attend(jit, isa, params, paged, q, latent, cache, scale, workers, options)
        assert (again == y).all()
    for token in (0, 3, 4):
        one = slice(token, token + 1)
        alone = attend(
            jit, isa, params, paged.only(token), guarded(q[one]), guarded(latent[one]), cache,
            scale, 2, options,
        )  # fmt: skip
        assert (alone[0] == y[token]).all()


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("params", SHAPES, ids=["deepseek", "ragged"])
def test_append(jit: Jit, isa: str, params: Params) -> None:
    need(isa)
    rng = np.random.default_rng(4)
    rank, rope, block = params["rank"], params["rope"], params["block"]
    for tokens in (1, 3, 33):
        paged = Paged.of(rng, block, [(t % 2, t // 2 * 7) for t in range(tokens)])
        if tokens > 1:
            paged.positions[0] = -1
        latent, key = floats(rng, tokens, rank + 2), floats(rng, tokens, rope + 1)
        cache = filled((paged.blocks, block, rank + rope), np.uint16)
        kept = [t for t in range(tokens) if paged.positions[t] >= 0]
        blocks, slots = zip(*(paged.place(t) for t in kept), strict=True)
        rows = bf16(np.concatenate([latent[kept, :rank], key[kept, :rope]], axis=1))
        expected = kv_append(cache[:, None], rows[:, None], np.array(blocks), np.array(slots))
        expected = expected[:, 0]
        in_turn(
            jit, spec_of("mla_append", isa, params), 2, latent=address(latent),
            latent_stride=rank + 2, k_rope=address(key), k_rope_stride=rope + 1,
            cache=address(cache), tables=address(paged.tables),
            table_stride=paged.tables.shape[1], sequence=address(paged.sequence),
            positions=address(paged.positions), tokens=tokens,
        )  # fmt: skip
        assert (cache == expected).all()
