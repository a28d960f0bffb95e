"""Codes to bf16 by tables in registers, for tiers that multiply pairs; what a table holds is what
the format's row says that codes are worth.

fp8: high and low byte of the BF16 value are functions of the 7 magnitude bits, which is just the
index that `vpermi2b` takes; subnormals and NaN are entries like the others. Interleaving high and
low bytes orders the words by 128-bit lane. int4: `vpermw` looks at 5 bits of each 16-bit word, so a
table that repeats after 16 entries decodes the lowest of its 4 nibbles, whatever lies above.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from hmc.codegen.ir import I8, I16, Emitter, Value, vec
from hmc.codegen.spec import WeightFormat
from hmc.codegen.vector import splat_int, unpack_masks
from hmc.formats import format_of


def bf16_table(weight: WeightFormat) -> list[int]:
    """BF16 bits of every code of a format."""
    return [int(bits) >> 16 for bits in np.array(format_of(weight).values, "f").view(np.uint32)]


def fp8_sign(e: Emitter, codes: Value) -> Value:
    """The sign bits of 64 codes `<64 x i8>`."""
    return e.b.and_(codes, splat_int(I8, 64, 0x80))


def fp8_byte(e: Emitter, codes: Value, shift: int) -> Value:
    """Eight bits, from bit `shift` on, of the values of 64 codes without their signs."""
    bits = bf16_table("fp8")
    low, high = (
        ir.Constant(codes.type, [ir.Constant(I8, word >> shift & 0xFF) for word in half])
        for half in (bits[:64], bits[64:128])
    )
    return e.call("llvm.x86.avx512.vpermi2var.qi.512", codes.type, low, codes, high)


def fp8_words(e: Emitter, top: Value, bottom: Value) -> list[Value]:
    """The values of 64 codes of their bytes, as `<32 x i16>`: of the lower codes of each 128 bits,
    then of the upper ones.
    """
    b, kind = e.b, vec(I16, 32)
    return [b.bitcast(b.shuffle_vector(bottom, top, mask), kind) for mask in unpack_masks(64)]


def int4_words(e: Emitter, words: Value) -> Value:
    """The values of the lowest nibbles of `<32 x i16>`."""
    bits = 2 * bf16_table("int4")
    table = ir.Constant(words.type, [ir.Constant(I16, word) for word in bits])
    return e.call("llvm.x86.avx512.permvar.hi.512", words.type, table, words)
