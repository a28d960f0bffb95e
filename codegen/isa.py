"""Kernel tiers, one row each: which CPU features a tier needs, what LLVM may use, and what kernels
may ask for; which tier this machine runs.

    tier          features                          what it brings                  since
    avx512_bf16   avx512 + BF16, VBMI, VNNI         dot products of bf16, i16 and   Zen 4,
                                                    i8, tables of 128 bytes         Sapphire Rapids
    avx512        avx2 + AVX-512 F, BW, DQ, VL, CD  512 bits, 32 registers          Skylake-X
    avx2          AVX2, FMA, F16C, BMI 1 and 2      256 bits, 16 registers          Haswell, Zen 1

Kernels ask for capabilities (`pair_dot`, `lanes`, `registers`, ...), never for a tier's name. LLVM
is handed exactly the features that the tier checks, on top of plain x86-64: the name of a CPU would
let it use what a virtual machine masks. A name only says whose instruction costs it schedules by.

The features come from /proc/cpuinfo alone: LLVM's own detection was seen to report features that a
virtual machine does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hmc import env
from hmc.errors import MachineError, UsageError


@dataclass(frozen=True)
class Isa:
    """A tier: `flags` as /proc/cpuinfo spells them, `tune` the CPU whose costs LLVM schedules by.

    `pair_dot`: sums of products of bf16 pairs into f32 (`vdpbf16ps`). `byte_table`: a byte of a
    table of 128, or a word of one of 32, for every lane (`vpermi2b`, `vpermw`). `whole_dot`: sums
    of products of i16 pairs, or of u8 and i8 fours, into i32 (`vpdpwssd`, `vpdpbusd`).
    """

    name: str
    vector_bits: int
    registers: int
    tune: str
    flags: frozenset[str]
    pair_dot: bool = False
    byte_table: bool = False
    whole_dot: bool = False
    pause: str = "llvm.x86.sse2.pause"

    @property
    def features(self) -> str:
        """Exactly `flags`, as LLVM spells features. The AVX features imply the older vector ones,
        as they do on every CPU that has them.
        """
        spelt = {"bmi1": "bmi", "avx512_bf16": "avx512bf16", "avx512_vnni": "avx512vnni"}
        names = [f"+{spelt.get(flag, flag)}" for flag in sorted(self.flags)]
        return ",".join([*names, "-prefer-256-bit"])

    @property
    def lanes(self) -> int:
        """f32 lanes of one vector."""
        return self.vector_bits // 32

    @property
    def token_tile(self) -> int:
        """Broadcast words that are multiplied by two vectors at once: their sums take three
        quarters of the registers.
        """
        return self.registers * 3 // 8


_AVX2 = frozenset("avx2 fma f16c bmi1 bmi2 popcnt".split())
_AVX512 = _AVX2 | frozenset("avx512f avx512bw avx512dq avx512vl avx512cd".split())
_BF16 = _AVX512 | frozenset("avx512_bf16 avx512vbmi avx512_vnni".split())

TIERS: dict[str, Isa] = {
    tier.name: tier
    for tier in (
        Isa(
            "avx512_bf16", 512, 32, "znver4", _BF16, pair_dot=True, byte_table=True, whole_dot=True
        ),
        Isa("avx512", 512, 32, "skylake-avx512", _AVX512),
        Isa("avx2", 256, 16, "haswell", _AVX2),
    )
}
"""Best first."""


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """The `flags` line of /proc/cpuinfo; empty where there is none."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()


def best_isa(flags: frozenset[str] | None = None) -> Isa:
    """The best tier for `flags` (this machine's by default), no better than `HMC_ISA` when that is
    set.

    Raises `MachineError` when no tier fits and `UsageError` when `HMC_ISA` names none or one the
    machine lacks.
    """
    have = cpu_flags() if flags is None else flags
    cap = env.isa_cap()
    if cap is not None:
        if cap not in TIERS:
            raise UsageError(f"HMC_ISA={cap}: no such kernel tier; choose from {', '.join(TIERS)}")
        require(cap, have)
        return TIERS[cap]
    for tier in TIERS.values():
        if tier.flags <= have:
            return tier
    missing = " ".join(sorted(TIERS["avx2"].flags - have))
    raise MachineError(f"this CPU has no kernel tier: the smallest, avx2, lacks {missing}")


def require(name: str, flags: frozenset[str] | None = None) -> Isa:
    """The tier `name`; `MachineError` names the features this machine (or `flags`) lacks for it."""
    have = cpu_flags() if flags is None else flags
    tier = TIERS[name]
    if missing := sorted(tier.flags - have):
        raise MachineError(f"kernel tier {name} needs {' '.join(missing)}, which this CPU lacks")
    return tier
