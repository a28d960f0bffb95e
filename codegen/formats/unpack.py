"""Decoding one vector's worth of stored weights to f32 vectors where lanes never cross: what decode
matmuls do on tiers without `vdpbf16ps`. Hides the bit tricks and the order that comes out.

A vector of codes is split by shifts and masks, so the f32 vectors hold every 4th code (fp8) or
every 2nd word (bf16): `order` says which, and activations are brought into that order once a call
(dot.py). Formats that are not named here stay as they are.

fp8: a code's sign moved to bit 15 and its magnitude to bit 4 of a word is, as the upper half of an
f32, the value x 2^-120, subnormal codes included (they are f32 subnormals). `FP8_ACTIVATIONS` is
what activations are scaled by in advance and `FP8_RESULT` what that leaves for the block scale: the
products stay far from both ends of f32's range. The two NaN codes come out as 480: who opens
weights for these tiers refuses those that hold one (`native.takes_nan`, kernels/nan_codes.py).
Watching for them here took a fifth of the time of a matmul.
"""

from __future__ import annotations

from llvmlite import ir

from hmc.codegen.ir import F32, I8, I16, I32, Emitter, Value, vec
from hmc.codegen.native import is_e4m3
from hmc.codegen.vector import splat_int
from hmc.formats import Format

FP8_ACTIVATIONS = 2.0**64
FP8_RESULT = 2.0**56


def steps_of(row: Format) -> int:
    """Vectors of f32 from one of stored weights; fp16 and f32 are taken a vector of f32 a time."""
    return 4 if is_e4m3(row) else 2 if row.codes.dtypes == ("BF16",) else 1


def order(steps: int, lanes: int) -> list[int]:
    """Which weight of a unit of so many vectors lane i of them, laid end to end, holds."""
    return [steps * lane + place for place in range(steps) for lane in range(lanes)]


def fp8_vectors(e: Emitter, codes: Value, multiply: bool = False) -> list[Value]:
    """4 n codes `<4n x i8>` to four `<n x float>` of value x 2^-120.

    `multiply`: with a multiplication in the place of two shifts, one operation less, where the
    multipliers have room for it (6 % faster for one token on Zen 3, 3 % slower for four).
    """
    b, count = e.b, codes.type.count // 2
    words = b.bitcast(codes, vec(I16, count))
    keep = splat_int(I16, count, 0x87F0)
    four, eight = (splat_int(I16, count, shift) for shift in (4, 8))
    odd = b.and_(b.ashr(words, four), keep)
    if multiply and count == 16:  # signed bytes times 16 and 0, added in pairs
        times = ir.Constant(codes.type, [ir.Constant(I8, 16), ir.Constant(I8, 0)] * count)
        moved = e.call("llvm.x86.avx2.pmadd.ub.sw", words.type, times, codes)
    else:
        moved = b.ashr(b.shl(words, eight), four)
    even = b.and_(moved, keep)
    low_even, high_even = bf16_vectors(e, even)
    low_odd, high_odd = bf16_vectors(e, odd)
    return [low_even, low_odd, high_even, high_odd]


def bf16_vectors(e: Emitter, words: Value) -> list[Value]:
    """2 n bf16 `<2n x i16>` to two `<n x float>`: the even ones, the odd ones."""
    b, count = e.b, words.type.count // 2
    pairs = b.bitcast(words, vec(I32, count))
    kind = vec(F32, count)
    low = b.shl(pairs, splat_int(I32, count, 16))
    high = b.and_(pairs, splat_int(I32, count, 0xFFFF0000))
    return [b.bitcast(low, kind), b.bitcast(high, kind)]
