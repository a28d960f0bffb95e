"""Codes to bf16 by tables in registers, for tiers that multiply pairs; what a table holds is what
the format's row says that codes are worth. One class a width of code; `pair_codes` chooses.

    Halves    bf16 as it is
    Bytes     high and low byte of the BF16 value are looked up by `vpermi2b`, which takes 7 bits:
              the magnitude where values of the upper half are those of the lower one with their
              sign changed (floats), else each half of the codes has its tables. Subnormals and NaN
              are entries like the others. Interleaving high and low bytes orders the words by
              128-bit lane.
    Nibbles   `vpermw` looks at 5 bits of each 16-bit word, so a table that repeats after 16 entries
              decodes the lowest of its 4 nibbles, whatever lies above

Of formats with zeros, tables hold what values are above their `middle`, and zeros are taken less by
as much: sums of codes and what is taken off them then have no large parts in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from llvmlite import ir

from hmc.codegen.ir import I8, I16, I32, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.vector import isplat, masked_vec, splat_int, unpack_masks, unpack_order
from hmc.formats import Format


def middle_of(row: Format) -> float:
    """What the values of a format's codes are taken less by, where zeros are taken off them."""
    zeros = any(plane.kind == "zero" for plane in row.scales)
    return float(2 ** (row.code_bits - 1)) if zeros else 0.0


@dataclass(frozen=True)
class PairCodes:
    """How the codes of a format become vectors of 32 bf16 (`<32 x i16>`).

    `unit` weights, one vector's worth of bytes, are decoded together, in an order of their own;
    where 16 rows have been interleaved, `quad` is what four of them lie side by side in, and a word
    of 32 bits holds `word` weights of a row.
    """

    row: Format
    unit: ClassVar[int] = 32
    quad: ClassVar[ir.IntType] = I32
    word: ClassVar[int] = 2

    @property
    def order(self) -> list[int]:
        """Which weight of a unit each lane of its vectors, laid end to end, holds."""
        return list(range(self.unit))

    def load(self, e: Emitter, base: Value, k: Value, valid: int) -> Value:
        """The unit at element `k` as it is stored, of which `valid` weights are read; zeros behind
        them.
        """
        return masked_vec(e, base, k, I16, self.unit, valid)

    def decode(self, e: Emitter, codes: Value) -> list[Value]:
        """What `load` loaded, in the order of `order`."""
        return [codes]

    def words(self, e: Emitter, base: Value, k: Value, valid: int) -> Value:
        """64 bytes as stored, of which those of `valid` weights are read."""
        return self.load(e, base, k, valid)

    def pairs(self, e: Emitter, words: Value) -> list[Value]:
        """`<16 x i32>` of stored words of 16 rows to vectors of pairs, neighbours of a row side by
        side.
        """
        return [words]

    @property
    def table(self) -> list[int]:
        """BF16 bits of what every code is above the middle."""
        values = np.array(self.row.values, "f") - np.float32(middle_of(self.row))
        return [int(bits) >> 16 for bits in values.view(np.uint32)]


class Halves(PairCodes):
    """bf16."""


class Bytes(PairCodes):
    """Codes of 8 bits."""

    unit = 64
    quad = I16
    word = 4

    @property
    def order(self) -> list[int]:
        """Lower and upper eight codes of each 128 bits."""
        return unpack_order(64, 0)[::2] + unpack_order(64, 1)[::2]

    def load(self, e: Emitter, base: Value, k: Value, valid: int) -> Value:
        """Bytes."""
        return masked_vec(e, base, k, I8, self.unit, valid)

    def decode(self, e: Emitter, codes: Value) -> list[Value]:
        """Two vectors."""
        b, kind = e.b, vec(I16, 32)
        top, bottom = byte_tables(e, self.table, codes)
        return [b.bitcast(b.shuffle_vector(bottom, top, mask), kind) for mask in unpack_masks(64)]

    def pairs(self, e: Emitter, words: Value) -> list[Value]:
        """Four codes a lane to two vectors."""
        return self.decode(e, e.b.bitcast(words, vec(I8, 64)))


def byte_tables(e: Emitter, bits: list[int], codes: Value) -> tuple[Value, Value]:
    """High and low bytes of what `bits` (16 each, of 256 codes) says of 64 codes of 8 bits."""
    b = e.b
    if bits[128:] == [word | 0x8000 for word in bits[:128]]:
        sign = b.and_(codes, splat_int(I8, 64, 0x80))
        return b.or_(_byte(e, bits[:128], 8, codes), sign), _byte(e, bits[:128], 0, codes)
    upper = b.icmp_signed("<", codes, splat_int(I8, 64, 0))
    top, bottom = (
        b.select(upper, *(_byte(e, half, at, codes) for half in (bits[128:], bits[:128])))
        for at in (8, 0)
    )
    return top, bottom


def _byte(e: Emitter, bits: list[int], shift: int, codes: Value) -> Value:
    """Eight bits, from bit `shift` on, of what 64 codes are by their lower 7 bits."""
    low, high = (
        ir.Constant(codes.type, [ir.Constant(I8, word >> shift & 0xFF) for word in half])
        for half in (bits[:64], bits[64:128])
    )
    return e.call("llvm.x86.avx512.vpermi2var.qi.512", codes.type, low, codes, high)


class Nibbles(PairCodes):
    """Codes of 4 bits, the first of a byte in its lower half."""

    unit = 128
    word = 8

    @property
    def order(self) -> list[int]:
        """Nibble 0 of every word of 16 bits, nibble 1, 2, 3."""
        return [4 * word + nibble for nibble in range(4) for word in range(32)]

    def load(self, e: Emitter, base: Value, k: Value, valid: int) -> Value:
        """Words of 16 bits, of a row that may end within one."""
        if valid % 4 and self.row.codes.dtypes[0] not in ("I32", "U32"):
            raw = masked_vec(e, base, e.b.lshr(k, const(1)), I8, 64, -(-valid // 2))
            return e.b.bitcast(raw, vec(I16, 32))
        return masked_vec(e, base, e.b.lshr(k, const(2)), I16, 32, -(-valid // 4))

    def decode(self, e: Emitter, codes: Value) -> list[Value]:
        """Four vectors."""
        shifts = (splat_int(I16, 32, shift) for shift in (4, 8, 12))
        return [self._values(e, w) for w in (codes, *(e.b.lshr(codes, s) for s in shifts))]

    def pairs(self, e: Emitter, words: Value) -> list[Value]:
        """Eight nibbles a lane to four vectors."""
        b = e.b
        # Nibble 2p falls on bit 0 of the low word, nibble 2p + 1 on bit 0 of the high word.
        order = lanes_mask([lane + (32 if lane % 2 else 0) for lane in range(32)])

        def shifted(right: int) -> Value:
            amount = isplat(abs(right), 16)
            return b.bitcast((b.lshr if right >= 0 else b.shl)(words, amount), vec(I16, 32))

        return [
            self._values(e, b.shuffle_vector(shifted(8 * pair), shifted(8 * pair - 12), order))
            for pair in range(self.word // 2)
        ]

    def _values(self, e: Emitter, words: Value) -> Value:
        """The values of the lowest nibbles of `<32 x i16>`."""
        bits = 2 * self.table
        table = ir.Constant(words.type, [ir.Constant(I16, word) for word in bits])
        return e.call("llvm.x86.avx512.permvar.hi.512", words.type, table, words)


def pair_codes(row: Format) -> PairCodes:
    """Those of a format that is multiplied as pairs of bf16."""
    if not row.values:
        return Halves(row)
    return {4: Nibbles, 8: Bytes}[row.code_bits](row)
