"""Kernel tiers: which CPU features each needs, what LLVM is told, and which one this machine runs.

    avx512_bf16   AVX-512 F/BW/DQ/VL + BF16 + VBMI: byte-table FP8 decode, `vdpbf16ps`   (Zen 4,
    Sapphire Rapids)
    avx512        AVX-512 F/BW/DQ/VL: FP8 by shifts in place, FP32 FMA; INT4 in whole numbers
    (Skylake-X, Cascade Lake)
    avx2          AVX2 + FMA + F16C: the same at 256 bits                                 (Haswell,
    Zen 1-3)

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
    """A tier: `flags` as /proc/cpuinfo spells them, `features` as LLVM does, `cpu` the named CPU it
    is emitted for.
    """

    name: str
    vector_bits: int
    cpu: str
    flags: frozenset[str]
    features: str

    @property
    def lanes(self) -> int:
        """f32 lanes of one vector."""
        return self.vector_bits // 32


_AVX2 = "avx2 fma f16c bmi1 bmi2 popcnt"
_AVX512 = _AVX2 + " avx512f avx512bw avx512dq avx512vl avx512cd"
_BF16 = _AVX512 + " avx512_bf16 avx512vbmi"


def _tier(name: str, bits: int, cpu: str, flags: str) -> Isa:
    features = "+sse4.2,+avx," + ",".join(
        "+" + {"bmi1": "bmi", "avx512_bf16": "avx512bf16"}.get(flag, flag) for flag in flags.split()
    )
    if bits == 512:
        features += ",-prefer-256-bit"
    return Isa(name, bits, cpu, frozenset(flags.split()), features)


TIERS: dict[str, Isa] = {
    tier.name: tier
    for tier in (
        _tier("avx512_bf16", 512, "znver4", _BF16),
        _tier("avx512", 512, "skylake-avx512", _AVX512),
        _tier("avx2", 256, "haswell", _AVX2),
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


def in_whole_numbers(isa: str, weight: str) -> bool:
    """Whether tier `isa` multiplies weights of that format by activations rounded to 16-bit whole
    numbers, chunk by chunk (whole.py); all others are multiplied by activations as they are.
    """
    return weight == "int4" and isa != "avx512_bf16"


def needs_numbers(isa: str) -> bool:
    """Whether the FP8 kernels of tier `isa` take NaN codes for numbers (unpack.py), so that weights
    must be checked for them; the others give NaN.
    """
    return isa != "avx512_bf16"
