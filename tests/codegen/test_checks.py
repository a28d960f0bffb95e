"""`check_spec`: what no emitter can build is refused in one line; emitters build all the rest."""

from __future__ import annotations

import random

import pytest

from hmc.codegen.checks import check_spec
from hmc.codegen.expr import SWIGLU
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError

ATTENTION = {"heads": 8, "kv_heads": 2, "head_dim": 64, "v_dim": 64, "block": 16}
LATENT = {"heads": 2, "nope": 32, "rope": 16, "v_dim": 32, "rank": 64, "block": 16}
EXPERTS = {"k": 64, "n": 64, "top_k": 2, "experts": 4}


@pytest.mark.parametrize(
    ("op", "weight", "params", "reason"),
    [
        ("matmul", "", {}, "no kernel is called matmul"),
        ("linear", "e5m2", {"k": 8, "tokens": 1}, "operand format 'e5m2'"),
        ("add", "bf16", {"width": 8}, "operand format 'bf16': choose none"),
        ("linear", "bf16", {"tokens": 1}, "size k"),
        ("linear", "bf16", {"k": 8, "tokens": 17}, "up to 16 tokens, not 17"),
        ("gemm", "int4", {"k": 64, "group": 0, "scale_dtype": 0}, "in groups, not of 0"),
        (
            "gemm",
            "int4",
            {"k": 64, "group": 64, "scale_dtype": 7},
            "scale in BF16 or F32 or F16, not",
        ),
        ("grouped_gate_up", "fp8", EXPERTS, "expression '': its end at character 1"),
        ("pointwise", "", {"width": 8}, "size groups"),
        ("attention", "", ATTENTION | {"kv_heads": 3}, "3 key heads by 8 heads"),
        ("attention", "", ATTENTION | {"block": 5}, "block even, not 5"),
        ("attention_prefill", "", ATTENTION | {"head_dim": 7}, "head_dim even, not 7"),
        ("attention_join", "", ATTENTION | {"window": 9, "chunk": 9}, "a window or chunks"),
        ("attention_prefill", "", ATTENTION | {"window": -9}, "no window of -9"),
        ("mla_attention", "", LATENT | {"rope": 7, "tokens": 1}, "rope even, not 7"),
        ("mla_prefill", "fp8", LATENT | {"nope": 25}, "nope [+] rope even, not 25 [+] 16"),
        ("rotary", "", {"heads": 1, "head_dim": 8, "start": 4, "dim": 6}, "6 of 8 elements from 4"),
        ("route", "", {"experts": 8, "top_k": 9}, "top_k 9 of 8"),
    ],
)
def test_what_cannot_be_built_is_refused(
    op: str, weight: str, params: dict[str, int], reason: str
) -> None:
    spec = KernelSpec.of(op, "avx2", weight=weight, **params)
    with pytest.raises(KernelError, match=reason) as told:
        check_spec(spec)
    assert "\n" not in str(told.value)


def test_an_expression_where_none_is_computed_is_refused() -> None:
    with pytest.raises(KernelError, match=r"add computes no expression such as 'h \* d0'"):
        check_spec(KernelSpec.of("add", "avx2", width=8, expr="h * d0"))


def test_an_unknown_tier_is_refused() -> None:
    with pytest.raises(KernelError, match="no tier neon"):
        check_spec(KernelSpec.of("read_tsc", "neon"))


def some_spec(rng: random.Random) -> KernelSpec:
    """Any op with any format and small sizes, odd ones too."""
    op = rng.choice(["attention", "attention_join", "attention_prefill", "kv_append", "mla_absorb",
                     "mla_append", "mla_attention", "mla_prefill", "mla_up", "linear", "gemm",
                     "experts_down", "grouped_gate_up", "route", "rotary"])  # fmt: skip
    names = [*ATTENTION, *LATENT, *EXPERTS, "dim", "groups", "top_groups"]
    params = {name: rng.randint(1, 50) for name in names}
    params |= {"kv_heads": rng.randint(1, 4), "heads": rng.choice([4, 6, 12]), "top_k": 2}
    params |= {"scoring": rng.randint(0, 2), "start": rng.randint(0, 8), "interleaved": 0}
    params |= {"group": rng.choice([32, 64, 128]), "scale_dtype": rng.choice([0, 1])}
    weight = rng.choice(["", "fp8", "bf16", "fp16", "f32", "int4"])
    tile = {"tokens": 1} if op in ("gemm", "mla_prefill", "grouped_gate_up") else {}
    out = rng.choice(["bf16", "f32"])
    isa, expr = rng.choice(list(TIERS)), SWIGLU if op == "grouped_gate_up" else ""
    return KernelSpec.of(op, isa, weight=weight, out=out, tile=tile, expr=expr, tokens=2, **params)


def test_emitters_build_what_is_not_refused(jit: Jit) -> None:
    rng, built = random.Random(5), set()
    while len(built) < 15:
        spec = some_spec(rng)
        try:
            check_spec(spec)
        except KernelError:
            continue
        if spec.op not in built:
            assert spec.symbol in jit.ir_text(spec)
            built.add(spec.op)
