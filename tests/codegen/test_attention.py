"""`kv_append`, `attention`, `attention_join` against float64.

Bound on the result: the bf16 rounding of y, and on avx512_bf16 that of the probabilities (2^-9 of
sum p |v| each).
"""

from __future__ import annotations

import numpy as np
import pytest
from attention_options import HEADS, OPTIONS, of_heads, option_args, option_spec
from dealt import dealt
from kernel_calls import address, bf16, filled, floats, from_bf16, guarded, in_turn, spec_of
from kernel_meanings import NO_OPTIONS, Options, attention, kv_append
from paged import Paged
from prefill_data import need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.attention.attend import attention_scratch_bytes
from hmc.errors import KernelError

Params = dict[str, int]
SHAPES: list[Params] = [
    {"heads": 16, "kv_heads": 2, "head_dim": 128, "v_dim": 128, "block": 32},
    {"heads": 6, "kv_heads": 2, "head_dim": 74, "v_dim": 40, "block": 24},
    {"heads": 5, "kv_heads": 1, "head_dim": 20, "v_dim": 33, "block": 6},
    {"heads": 2, "kv_heads": 2, "head_dim": 64, "v_dim": 96, "block": 16},
    {"heads": 24, "kv_heads": 1, "head_dim": 16, "v_dim": 16, "block": 512},
]


def run(
    jit: Jit,
    isa: str,
    params: Params,
    paged: Paged,
    q: np.ndarray,
    cache: tuple[np.ndarray, np.ndarray],
    workers: int,
    options: Options = NO_OPTIONS,
) -> np.ndarray:
    """y bits [tokens, heads, v_dim]."""
    tokens, heads, v_dim = len(q), params["heads"], params["v_dim"]
    columns = heads * v_dim
    y = filled((tokens, columns + 1), np.uint16)
    spec = option_spec("attention", isa, params, options)
    join = option_spec("attention_join", isa, params, options)
    size = attention_scratch_bytes(spec, tokens, paged.max_context)
    scratch = guarded(np.full(size, 0xFF, np.uint8))
    common = {
        "positions": address(paged.positions), "y": address(y), "y_stride": columns + 1,
        "tokens": tokens, "scratch": address(scratch),
    }  # fmt: skip
    in_turn(
        jit, spec, workers, **common, q=address(q), q_stride=q.shape[1], k_cache=address(cache[0]),
        v_cache=address(cache[1]), tables=address(paged.tables),
        table_stride=paged.tables.shape[1], sequence=address(paged.sequence),
        scale=params["head_dim"] ** -0.5, **option_args("attention", options),
    )  # fmt: skip
    in_turn(jit, join, workers, **common, **option_args("attention_join", options))
    assert (y[:, columns:] == 77).all()
    return y[:, :columns].reshape(tokens, heads, v_dim)


def caches(
    rng: np.random.Generator, paged: Paged, params: Params
) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """(bits of k and v, f64 of k and v), [blocks, kv_heads, block, dim]; the bits guarded."""
    found = [paged.rows(rng, params["kv_heads"], params[dim]) for dim in ("head_dim", "v_dim")]
    bits, values = (
        tuple(np.ascontiguousarray(pair[i].swapaxes(1, 2)) for pair in found) for i in range(2)
    )
    return (guarded(bits[0]), guarded(bits[1])), (values[0], values[1])


def exact(
    params: Params,
    paged: Paged,
    q: np.ndarray,
    values: tuple[np.ndarray, np.ndarray],
    *,
    magnitude: bool = False,
    options: Options = NO_OPTIONS,
) -> np.ndarray:
    """The float64 result, or sum p |v|."""
    k, v = values
    rows = q[:, : params["heads"] * params["head_dim"]].reshape(len(q), params["heads"], -1)
    return attention(
        rows, k, np.abs(v) if magnitude else v, paged.tables, paged.sequence, paged.positions,
        params["head_dim"] ** -0.5, options,
    )  # fmt: skip


def query(rng: np.random.Generator, params: Params, tokens: int) -> np.ndarray:
    """f32 [tokens, heads * head_dim + 3]: scores of a few units."""
    return guarded(2 * floats(rng, tokens, params["heads"] * params["head_dim"] + 3))


def check(jit: Jit, isa: str, params: Params, options: Options = NO_OPTIONS) -> None:
    """Within the bounds of rounding, whatever the workers and who else is in the batch."""
    need(isa)
    rng, options = np.random.default_rng(params["heads"]), of_heads(options, params["heads"])
    # Empty, one position, around partition and block borders, and two tokens of one sequence.
    places = [(0, 598), (1, 0), (2, 255), (0, 599), (3, 256), (4, -1), (5, 31), (6, 511)]
    paged = Paged.of(rng, params["block"], places)
    bits, values = caches(rng, paged, params)
    q = query(rng, params, len(places))
    y = run(jit, isa, params, paged, q, bits, 1, options)
    result = from_bf16(y)
    rounding = 2.0**-8 if isa == "avx512_bf16" else 1e-5
    bound = exact(params, paged, q, values, magnitude=True, options=options) * rounding
    reference = exact(params, paged, q, values, options=options)
    assert (np.abs(result - reference) <= 2.0**-8 * np.abs(reference) + bound).all()
    assert (result[5] == 0).all()
    for workers in (2, 4):
        assert (run(jit, isa, params, paged, q, bits, workers, options) == y).all()
    for token in (0, 3, 4):
        one, mine = paged.only(token), guarded(q[token : token + 1])
        assert (run(jit, isa, params, one, mine, bits, 2, options)[0] == y[token]).all()


@pytest.mark.few(4)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("params", SHAPES, ids=str)
def test_attention(jit: Jit, isa: str, params: Params) -> None:
    check(jit, isa, params)


@pytest.mark.few(4)
@pytest.mark.parametrize(("isa", "options", "params"), dealt(TIERS, OPTIONS, SHAPES))
def test_options(jit: Jit, isa: str, params: Params, options: Options) -> None:
    check(jit, isa, params, options)


@pytest.mark.few(3)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("params", HEADS, ids=str)
def test_heads_of_any_size(jit: Jit, isa: str, params: Params) -> None:
    check(jit, isa, params, Options(window=90))


@pytest.mark.parametrize("isa", TIERS)
def test_many_tokens_and_more_workers_than_tasks(jit: Jit, isa: str) -> None:
    need(isa)
    params = SHAPES[0]
    rng = np.random.default_rng(9)
    for tokens in (1, 16, 33):
        paged = Paged.of(rng, params["block"], [(0, 300 + t) for t in range(tokens)])
        bits, values = caches(rng, paged, params)
        q = query(rng, params, tokens)
        y = run(jit, isa, params, paged, q, bits, 4)
        reference = exact(params, paged, q, values)
        assert np.abs(from_bf16(y) - reference).max() < 2.0**-7 * np.abs(reference).max()
        assert (run(jit, isa, params, paged, q, bits, 17) == y).all()


def test_rounding_queries_by_two_terms_costs_no_accuracy(jit: Jit) -> None:
    """The error is that of the f32 kernel, whose only rounding to bf16 is that of y."""
    need("avx512_bf16")
    params = SHAPES[0]
    rng = np.random.default_rng(10)
    paged = Paged.of(rng, params["block"], [(0, 599)])
    bits, values = caches(rng, paged, params)
    q = query(rng, params, 1)
    reference = exact(params, paged, q, values)
    errors = {
        isa: np.sqrt(
            np.mean((from_bf16(run(jit, isa, params, paged, q, bits, 1)) - reference) ** 2)
        )
        for isa in ("avx512_bf16", "avx512")
    }
    assert errors["avx512_bf16"] < 1.2 * errors["avx512"]


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("params", SHAPES[:3], ids=str)
def test_kv_append(jit: Jit, isa: str, params: Params) -> None:
    need(isa)
    rng = np.random.default_rng(11)
    kv_heads = params["kv_heads"]
    for tokens in (1, 3, 33):
        paged = Paged.of(rng, params["block"], [(t % 2, t // 2 * 7) for t in range(tokens)])
        # A padding token writes nowhere.
        paged.positions[0] = -1 if tokens > 1 else 0
        k, v = (floats(rng, tokens, kv_heads * params[d] + 1) for d in ("head_dim", "v_dim"))
        expected, results = [], []
        for rows, dim in ((k, params["head_dim"]), (v, params["v_dim"])):
            start = filled((paged.blocks, kv_heads, params["block"], dim), np.uint16)
            kept = [t for t in range(tokens) if paged.positions[t] >= 0]
            blocks, slots = zip(*(paged.place(t) for t in kept), strict=True)
            heads = bf16(rows[kept, :-1]).reshape(len(kept), kv_heads, dim)
            expected.append(kv_append(start, heads, np.array(blocks), np.array(slots)))
            results.append(start)
        in_turn(
            jit, spec_of("kv_append", isa, params), 3, k=address(k),
            k_stride=k.shape[1], v=address(v), v_stride=v.shape[1], k_cache=address(results[0]),
            v_cache=address(results[1]), tables=address(paged.tables),
            table_stride=paged.tables.shape[1], sequence=address(paged.sequence),
            positions=address(paged.positions), tokens=tokens,
        )  # fmt: skip
        for result, cache in zip(results, expected, strict=True):
            assert (result == cache).all()


@pytest.mark.parametrize(
    "wrong", [{"heads": 15}, {"block": 5}, {"head_dim": 7}], ids=lambda wrong: next(iter(wrong))
)
def test_shapes_without_a_kernel_are_refused(jit: Jit, wrong: Params) -> None:
    with pytest.raises(KernelError, match="attention"):
        jit.ir_text(spec_of("attention", "avx2", (SHAPES[0] | wrong)))


def test_each_tier_multiplies_with_its_own_instructions(jit: Jit) -> None:
    """A dozen sums stay in registers: multiplies far outnumber the vectors stored."""
    for isa, multiply, foreign in (
        ("avx512_bf16", "vdpbf16ps", "vfmadd231ps\t%zmm"),
        ("avx512", "vfmadd231ps", "vdpbf16ps"),
        ("avx2", "vfmadd231ps", "zmm"),
    ):
        loops = jit.assembly(spec_of("attention", isa, SHAPES[0])).split("\n.LBB")
        inner = max(loops, key=lambda block: block.count(multiply) - 8 * block.count("%rsp"))
        assert inner.count(multiply) >= 8, isa
        assert foreign not in inner
        assert not [line for line in inner.splitlines() if "vmov" in line and ", " in line
                    and line.rstrip().endswith(("(%rsp)", "(%rbp)"))]  # fmt: skip
