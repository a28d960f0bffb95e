"""Register-only multiply-adds: the arithmetic peak that prefill kernels are measured against.

Nothing is loaded inside the loop; the accumulators are independent, and more than latency times
throughput of the multiply-add (Zen 4: 6 cycles x 1 a cycle at 512 bits; Haswell: 5 x 2).
"""

from __future__ import annotations

from hmc.codegen.ir import F32, Emitter, Value, const, vec
from hmc.codegen.isa import Isa
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import dot_pairs

_UNROLL = 4


def emit_dot_peak(e: Emitter) -> None:
    """IR of `dot_peak`: `rounds` rounds of `dot_peak_flops(spec)` operations; sink[worker] = a sum
    that needs them all."""
    b = e.b
    tier = e.tier
    lanes = tier.lanes
    # Operands depend on the worker so that nothing folds; small, finite and normal.
    seed = b.uitofp(b.add(b.and_(e.worker, const(7)), const(1)), F32)
    x = e.splat(seed, lanes)
    y = e.splat(b.fdiv(seed, F32(-64.0)), lanes)
    sums = [e.local(vec(F32, lanes), e.splat(F32(float(i)), lanes)) for i in range(_chains(tier))]

    def multiply_add(total: Value) -> Value:
        return dot_pairs(e, total, x, y) if tier.pair_dot else e.fma(x, y, total)

    with e.for_range(const(0), e.arg["rounds"]):
        for _ in range(_UNROLL):
            for slot in sums:
                b.store(multiply_add(b.load(slot)), slot)
    total = b.load(sums[0])
    for slot in sums[1:]:
        total = b.fadd(total, b.load(slot))
    e.store(e.reduce_add(total), e.arg["sink"], e.worker, align=4)


def dot_peak_flops(spec: KernelSpec) -> int:
    """Floating-point operations (a multiply-add counts two) of one round of one worker.

    chains x unroll x f32 lanes x 2, doubled where each lane takes a pair of bf16 products
    (`vdpbf16ps`).
    """
    tier = spec.tier
    return _chains(tier) * _UNROLL * tier.lanes * 2 * (2 if tier.pair_dot else 1)


def _chains(tier: Isa) -> int:
    """Sums side by side: three quarters of the registers."""
    return tier.registers * 3 // 4
