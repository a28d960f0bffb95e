"""Blocks of GGUF as kernels see them, and how a format of theirs is multiplied: what `kquants.py`
and `small_codes.py` fill in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from llvmlite import ir

from hmc.codegen.formats.code_words import Words
from hmc.codegen.ir import F16, F32, I1, I8, I16, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.vector import concat

LANES, WORDS, BYTES = 16, 32, 64
"""f32, bf16 and codes of a vector."""


@dataclass(frozen=True)
class Block:
    """What lies at `address` (i8*): a block of 256 columns, or `count` of 32, `size` bytes each;
    codes become `words`.
    """

    e: Emitter
    words: Words
    address: Value
    count: int
    size: int
    _made: dict[object, Value] = field(default_factory=dict)

    def once(self, make: Callable[..., Value], *args: int) -> Value:
        """`make(self, *args)`, emitted where it is first asked for."""
        key = (make, *args)
        if key not in self._made:
            self._made[key] = make(self, *args)
        return self._made[key]

    def pairs(self, values: Sequence[float], codes: Value) -> list[Value]:
        """Words of 64 codes: of those in even places, then of those in odd ones."""
        return self.words.pairs(self.e, values, codes)

    def load(self, at: int, kind: ir.Type) -> Value:
        """The number at byte `at`."""
        return self.e.load(self.e.offset(self.address, const(at)), const(0), kind)

    def half(self, at: int, lanes: int) -> Value:
        """The f16 number at byte `at`, as f32 in all lanes."""
        return self.e.splat(self.e.b.fpext(self.load(at, F16), F32), lanes)

    def bytes(self, at: int, count: int = BYTES) -> Value:
        """`<count x i8>`."""
        return self.e.load_vec(self.address, const(at), I8, count)

    def each(self, at: int, kind: ir.IntType) -> Value:
        """`<16 x kind>`: what stands at byte `at` of each of four blocks of 32, in the four lanes
        of its codes; 0 for blocks that are not there.
        """
        found: Value = self.e.zeros(kind, LANES)
        for number in range(self.count):
            mask = ir.Constant(vec(I1, LANES), [int(lane // 4 == number) for lane in range(LANES)])
            one = self.e.splat(self.load(number * self.size + at, kind), LANES)
            found = self.e.b.select(mask, one, found)
        return found

    def sixteens(self, at: int) -> Value:
        """`<64 x i8>`: the 16 bytes from `at` on of each of four blocks of 32."""
        none = self.e.zeros(I8, 16)
        starts = [number * self.size + at for number in range(self.count)]
        parts = [self.bytes(start, 16) for start in starts] + [none] * (4 - self.count)
        return concat(self.e, parts)


@dataclass(frozen=True)
class Kind:
    """How blocks of a format are multiplied: `unit` columns at once, by steps, each of some vectors
    of codes that share the vector of scales.

    `columns[step]`: the column of each code of the step in the order of its vectors; in longer
    units the steps repeat. `vectors(block, step)`: `<32 x i16>`.
    `scales(block, step)`: `<16 x float>`. `minima(block)`: `<16 x float>`, of each `summed`
    columns, what is added to each, in the lanes `at`. `least` is the least value of a code that is
    negative; `lifted(block)`, as minima are, what it is multiplied by.
    """

    unit: int
    columns: tuple[tuple[int, ...], ...]
    vectors: Callable[[Block, int], list[Value]]
    scales: Callable[[Block, int], Value]
    minima: Callable[[Block], Value] | None = None
    summed: int = 32
    at: range = range(LANES)
    least: int = 0
    lifted: Callable[[Block], Value] | None = None

    def __post_init__(self) -> None:
        beside = self.minima or self.lifted
        assert beside is None or len(self.at) * self.summed == self.unit, "lanes without a sum"

    @property
    def period(self) -> int:
        """Columns after which the steps repeat."""
        return sum(map(len, self.columns))

    @property
    def steps(self) -> int:
        """In a unit."""
        return self.unit // self.period * len(self.columns)


def words_of(codes: Value, e: Emitter) -> Value:
    return e.b.bitcast(codes, vec(I16, WORDS))


def spread(block: Block, scales: Value, groups: Sequence[int]) -> Value:
    """`<16 x float>`: of `scales` the one of each group, in as many lanes each as there are."""
    mask = lanes_mask([groups[lane * len(groups) // LANES] for lane in range(LANES)])
    return block.e.b.shuffle_vector(scales, ir.Constant(scales.type, ir.Undefined), mask)
