"""Tiers: machine code keeps to the features that a tier checks; nothing asks for a tier by name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from hmc.codegen.expr import SWIGLU
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit, optimised, target_machine
from hmc.codegen.spec import KernelSpec

ROOT = Path(__file__).resolve().parents[2]

X86_64 = re.compile(
    r"(adc|add|and|bt|call|cmp|cmpxchg|dec|div|idiv|imul|inc|lea|mov|movabs|movs[bwl]|movz[bw]|neg|nop"
    r"|not|or|pop|push|ret|sar|sbb|shl|shr|sub|test|xadd|xchg|xor)[bwlq]?"
    r"|cltq|cqto|cmov[a-z]+|j[a-z]+|lock|pause|prefetch(t[012]|nta)|rdtsc|set[a-z]+|syscall"
)
VECTORS = {
    "bmi1": "andn[lq] bextr[lq] bls(i|r|msk)[lq] tzcnt[lq]",
    "bmi2": "bzhi[lq] mulx[lq] pdep[lq] pext[lq] rorx[lq] sarx[lq] shlx[lq] shrx[lq]",
    "popcnt": "popcnt[lq]",
    "fma": "vfn?m(add|sub)(132|213|231)[ps]s",
    "f16c": "vcvtph2ps vcvtps2ph",
    "avx2": """v(add|andn?|blendv?|cmp[a-z]+|div|hadd|maskmov|max|min|mov[au]|movmsk|mul|or)[ps][sd]
        v(perm|permil|round|shuf|sqrt|sub|ucomi|unpck[hl]|xor)[ps][sd] vbroadcast(ss|i128|f128)
        vcvtdq2ps vcvtsi2ss vcvttss2si vextract[if]128 vinsert[if]128 vinsertps vmov[dq] vmovdq[au]
        vmov[hl]ps vmovs[hl]dup vmovs[sd] vpack[su]s(dw|wb) vpadd[bdqw] vpandn? vpblend[dw]
        vpblendvb vpbroadcast[bdqw] vpcmp(eq|gt)[bdqw] vperm2[if]128 vperm[dq] vpextr[bdqw]
        vpinsr[bdqw] vpmaddubsw vpmaddwd vpmaskmov[dq] vp(max|min)[su][bdw] vpmovmskb
        vpmov[sz]x[bdw][dqw] vpmulld vpor vpshuf(b|d|hw|lw) vp(sll|sra|srl)[dqw]
        vp(sll|sra|srl)v[dq] vp(sll|srl)dq vpsub[bdqw] vpunpck[hl](bw|dq|qdq|wd)
        vpxor vzeroupper""",
    "avx512f": """k(add|and|mov|not|or|ortest|shift[lr]|test|unpck|xnor|xor)[bdqw]* valign[dq]
        v(broadcast|extract|insert|shuf)[if](32|64)x[248] vmovdqa(32|64) vmovdqu(8|16|32|64)
        vp(and|andn|or|xor|ternlog|blendm|abs)[bdqw] vperm[it]2([dqw]|p[sd]) vpermw vpmov[bdqw]2m
        vpmovm2[bdqw] vpmov(db|dw|qd|qw|wb) vpcmp[a-z]*[bdqw] vptestn?m[bdqw]
        v(blendm|compress|expand)p[sd] vpsrlvw vpsllvw vpsravw""",
    "avx512_bf16": "vcvtne2ps2bf16 vcvtneps2bf16 vdpbf16ps",
    "avx512_vnni": "vpdpwssd",
    "avx512vbmi": "vperm[it]2b vpermb",
}
"""Mnemonics, by the flag of /proc/cpuinfo that says a CPU has them; AVX comes with avx2, and F, BW,
DQ, VL and CD with avx512f, since every tier asks for all of them or none."""

WIDE = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])")
"""Registers that only AVX-512 has."""


def flag_of(mnemonic: str) -> str | None:
    """What a CPU must have for an instruction: "" what all have, None unknown."""
    if X86_64.fullmatch(mnemonic):
        return ""
    for flag, names in VECTORS.items():
        if any(re.fullmatch(name, mnemonic) for name in names.split()):
            return flag
    return None


def foreign(assembly: str, flags: frozenset[str]) -> set[str]:
    """Instructions that a CPU with `flags` and no other feature may lack."""
    found, known = set(), {}
    for line in assembly.splitlines():
        if not (match := re.match(r"\t([a-z]\w*)(.*)", line)):
            continue
        mnemonic, operands = match.groups()
        flag = known.setdefault(mnemonic, flag_of(mnemonic))
        if flag is None or (flag and flag not in flags):
            found.add(mnemonic)
        if "avx512f" not in flags and WIDE.search(operands):
            found.add(line.strip())
    return found


_QUIRK = "sigmoid(x0) * tanh(b0) * (v0 + 1.0) + x0 * rsqrt(mean(x0 * x0) + 1e-05)"


def kernels(isa: str) -> list[KernelSpec]:
    """Every op, matmuls in every format; small sizes and tiles, whose instructions are the same."""

    def spec(op: str, weight: str = "", expr: str = "", **params: int) -> KernelSpec:
        tile = {"tokens": 2} if op in ("gemm", "mla_prefill") or "grouped" in op else {}
        groups = {"group": 32, "scale_dtype": 0} if weight == "int4" else {}
        return KernelSpec.of(op, isa, weight=weight, tile=tile, expr=expr, **(params | groups))

    latent = {"heads": 2, "nope": 24, "rope": 8, "v_dim": 16, "rank": 64, "block": 8}
    shared = {"heads": 8, "kv_heads": 2, "head_dim": 40, "v_dim": 24, "block": 8}
    indexer = "index_append index_scores index_choose index_prefill"
    chosen = {"index_heads": 2, "index_block": 4, "index_topk": 3}
    blocks = {"heads": 2, "dim": 24, "block": 8, "index_block": 4, "index_topk": 3}
    experts = {"k": 160, "n": 96, "top_k": 2, "experts": 4}
    windows = {"heads": 4, "head_dim": 40, "window": 16, "block": 8, "ratio": 4}
    rows = {"width": 40, "ratio": 4, "rope_dim": 8, "block": 8}
    recurrent = {"heads": 4, "key_heads": 2, "key_dim": 24, "value_dim": 40}
    found = [
        *(
            spec(f"linear_attention{many}", **recurrent, channels=delta, delta=delta)
            for many in ("", "_prefill")
            for delta in (0, 1)
        ),
        *(spec(op, **shared) for op in ("kv_append", "attention", "attention_join")),
        *(spec(op, **latent, tokens=2) for op in ("mla_append", "mla_attention")),
        spec("attention_prefill", **shared),
        *(
            spec(
                op,
                expr="5.0 * tanh(score / 5.0)",
                **shared,
                window=9,
                growth_every=4,
                growth_from=1,
            )
            for op in ("attention", "attention_prefill")
        ),
        *(spec(op, **shared, chunk=9, sinks=1) for op in ("attention_join", "attention_prefill")),
        *(
            spec(op, **shared, **chosen)
            for op in ("attention", "attention_join", "attention_prefill")
        ),
        *(
            spec(f"block_{step}", **blocks, index_local=1)
            for step in ("scores", "choose", "prefill")
        ),
        spec("mla_attention_join", **latent, tokens=2),
        spec("mla_gather", **latent, index_topk=20),
        spec("mla_gather", **latent, index_topk=23, pool=4),
        spec("mla_append", **latent | {"rope": 0}),
        *(spec(op, heads=20, dim=12, block=8, index_topk=20) for op in indexer.split()),
        spec("route", experts=64, top_k=6, scoring=1, normalise=1, groups=8, top_groups=4),
        spec("route", experts=60, top_k=4, scoring=0),
        spec("route", experts=60, top_k=4, scoring=5),
        spec("hash_route", experts=60, top_k=4, scoring=5, normalise=1),
        spec("hyper_weights", streams=4, parts=3, iterations=20),
        *(spec(op, width=100, streams=4) for op in ("hyper_in", "hyper_copy")),
        *(spec("hyper_out", width=100, streams=4, parts=parts) for parts in (2, 3)),
        *(spec(op, head_dim=40, window=16) for op in ("window_append", "window_gather")),
        *(spec(op, **rows, overlap=1) for op in ("compress", "compress_rows")),
        spec("compress_rows", width=36, ratio=4, overlap=0, block=16),
        spec("pool_positions", index_topk=20, pool=4),
        spec("attend_few", **windows, index_topk=20),
        spec("attend_prefill", **windows),
        spec("sort_experts", top_k=2, experts=4),
        spec("resident_ids", top_k=2),
        spec("stream_read", streams=2),
        *(spec(op, width=100) for op in ("gather_rows", "add")),
        spec("conv", expr="silu(x)", width=100, taps=4, biased=1),
        spec("selective_scan", width=100, states=12),
        spec("pointwise", expr=_QUIRK, width=33, groups=1, x0=33, b0=33, v0=33),
        *(spec(op, "bf16", width=100) for op in ("embed", "norm", "add_norm")),
        spec("rotary", "fp16", heads=2, head_dim=40, start=8, dim=24, interleaved=0),
        spec("rotary", heads=2, head_dim=40, start=0, dim=24, interleaved=1),
        spec("position_scale", heads=2, head_dim=40),
    ]
    others = "stream_fill dot_peak nan_codes flag_wait flag_set worker_loop pool_call read_tsc"
    found += [spec(op) for op in others.split()]
    for weight in ("fp8", "bf16", "fp16", "f32", "int4"):
        found += [spec(op, weight, k=160, tokens=1) for op in ("linear", "gemm")]
    found.append(spec("screen_copy", "bf16", k=160, group=32))
    found.append(spec("screen_tops", k=160, tokens=1))
    found += [spec(op, "bf16", k=160, tokens=1) for op in ("screen", "screen_rows")]
    for weight in ("fp8", "int4"):
        found.append(spec("mla_absorb", weight, **latent, tokens=1))
    return [
        *found,
        spec("gate_up", "fp8", SWIGLU, k=128, tokens=1),
        spec("experts_gate_up", "fp8", SWIGLU, **experts, tokens=1),
        spec("experts_down", "fp8", **experts, tokens=1),
        spec("grouped_gate_up", "fp8", SWIGLU, **experts),
        spec("grouped_down", "fp8", **experts),
        *(spec(op, "fp8", **latent, tokens=1) for op in ("mla_up", "mla_prefill")),
        spec("sparse_mla_prefill", "fp8", **latent, tokens=2, index_topk=20),
    ]


@pytest.mark.few(2)
@pytest.mark.parametrize("part", range(6))
@pytest.mark.parametrize("isa", TIERS)
def test_kernels_keep_to_the_features_of_their_tier(jit: Jit, isa: str, part: int) -> None:
    specs = kernels(isa)
    assert {spec.op for spec in specs} == set(jit._emitters)
    for spec in specs[part::6]:
        assert not foreign(jit.assembly(spec), TIERS[isa].flags), spec


TEMPTING = """
define <16 x i32> @shifted(<16 x i32> %a, <16 x i32> %b, <16 x i32> %c) {
  %r = call <16 x i32> @llvm.fshl.v16i32(<16 x i32> %a, <16 x i32> %b, <16 x i32> %c)
  %s = call <16 x i32> @llvm.ctpop.v16i32(<16 x i32> %r)
  ret <16 x i32> %s
}
define i64 @counted(i64 %a) {
  %r = call i64 @llvm.ctlz.i64(i64 %a, i1 false)
  ret i64 %r
}
declare <16 x i32> @llvm.fshl.v16i32(<16 x i32>, <16 x i32>, <16 x i32>)
declare <16 x i32> @llvm.ctpop.v16i32(<16 x i32>)
declare i64 @llvm.ctlz.i64(i64, i1)
"""
"""One instruction each, on the CPUs that tiers are named after; features that no tier checks."""


@pytest.mark.parametrize("isa", TIERS)
def test_llvm_may_use_nothing_that_is_not_checked(isa: str) -> None:
    tier = TIERS[isa]
    text = str(target_machine(tier).emit_assembly(optimised(TEMPTING, tier)))
    for mnemonic in ("vpshldvd", "vpopcntd", "lzcntq"):
        assert mnemonic not in text
    assert "vpshldvd" in foreign("\tvpshldvd\t%zmm0, %zmm1, %zmm2", tier.flags)


def test_nothing_is_compared_with_a_tier() -> None:
    """Kernels ask for capabilities; only codegen/isa.py knows names."""
    for top in ("hmc", "passes", "runtime", "codegen"):
        for path in sorted((ROOT / top).rglob("*.py")):
            source = path.read_text()
            if not re.search(r"\bisa\b|avx", source):
                continue
            for node in ast.walk(ast.parse(source)):
                if not isinstance(node, ast.Compare):
                    continue
                text = ast.unparse(node)
                named = any(f"'{name}'" in text for name in TIERS)
                equal = any(isinstance(op, ast.Eq | ast.NotEq) for op in node.ops)
                sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
                tier = any(re.fullmatch(r"(\w+\.)*isa(\.name)?", side) for side in sides)
                assert not named, (path, text)
                assert not (equal and tier), (path, text)
