"""Many-token matmul core: weight panels decoded once, then register tiles of rows x tokens; hides layouts and tiers.

A panel is two vectors of weight rows by one chunk of K. Each chunk is decoded straight from checkpoint rows into an L1
scratch panel in which one vector holds the same K position of `lanes` rows, so sums run along K inside lanes and nothing
is ever added across lanes. Tokens are copied once to [chunk][token][K of the chunk], and tiles of up to `tile` of them
are multiplied by broadcasting:

    dot form   bf16 pairs, panel [K/2][2][16] pairs, `vdpbf16ps` (avx512_bf16 with fp8, bf16 and int4: all exact in bf16);
               sums of one scale group are scaled into f32 totals by one multiply-add for 16 to 64 dot products
    fma form   f32, panel [K][2][lanes], fused multiply-add; scales are applied while decoding (every other case)

Arithmetic of one output depends on its row and token alone: never on tile, worker or neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llvmlite import ir

from hmc.codegen.interleave import decode_columns, decode_pairs
from hmc.codegen.ir import F32, I8, I16, I32, I64, Emitter, Value, const, vec
from hmc.codegen.isa import TIERS
from hmc.codegen.spec import FP8_BLOCK, KernelSpec
from hmc.codegen.vector import bf16_pairs
from hmc.codegen.weights import masked_vec, row_bytes

VECTORS = 2
"""Vectors of weight rows in a panel."""

_CHUNK = 128
_UNROLL = 4
_PTR = I8.as_pointer()
_DOT = "llvm.x86.avx512bf16.dpbf16ps.512"


@dataclass(frozen=True)
class Form:
    """How one spec multiplies: everything here follows from its format, tier and K.

    `dot` tells the two forms apart; `tile` tokens are multiplied at once; `group` weights of a row share a scale (0: no
    scales).
    """

    spec: KernelSpec
    k: int
    lanes: int
    dot: bool
    tile: int
    group: int

    @staticmethod
    def of(spec: KernelSpec) -> Form:
        """The form of `spec` (params: k; int4 also group)."""
        lanes = TIERS[spec.isa].lanes
        return Form(
            spec=spec,
            k=spec["k"],
            lanes=lanes,
            dot=spec.isa == "avx512_bf16" and spec.weight in ("fp8", "bf16", "int4"),
            tile=spec.tiled("tokens", 12 if lanes == 16 else 6),
            group={"fp8": FP8_BLOCK, "int4": spec.get("group", 128)}.get(spec.weight, 0),
        )

    @property
    def step(self) -> int:
        """Weights of a row that one multiply takes."""
        return 2 if self.dot else 1

    @property
    def rows(self) -> int:
        """Rows of a panel."""
        return VECTORS * self.lanes

    @property
    def chunks(self) -> int:
        """Chunks of K, the last of which may be short."""
        return -(-self.k // _CHUNK)

    @property
    def scale_bytes(self) -> int:
        """Bytes of one stored scale."""
        return 2 if self.spec.weight == "int4" else 4

    @property
    def scale_stride(self) -> int:
        """Bytes from one row of stored scales to the next (fp8: one row of blocks)."""
        return -(-self.k // self.group) * self.scale_bytes if self.group else 0

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's chunk in the packed copy."""
        return _CHUNK * 4 // self.step

    @property
    def block(self) -> int:
        """Most tokens that one pass over the weights multiplies: their packed copy should stay in L2."""
        fits = self.spec.tiled("x_bytes", 768 << 10) // (self.chunks * self.token_bytes)
        return max(48, min(256, fits))

    # Scratch of one worker: panel, scales f32 [group][rows], totals f32 [block][rows], packed tokens.

    @property
    def scales_offset(self) -> int:
        """Where the scales start."""
        return _CHUNK // self.step * self.rows * 4

    @property
    def totals_offset(self) -> int:
        """Where the totals start; a chunk has up to four scale groups."""
        return self.scales_offset + 4 * self.rows * 4

    @property
    def x_offset(self) -> int:
        """Where the packed tokens start."""
        return self.totals_offset + self.block * self.rows * 4

    @property
    def scratch_bytes(self) -> int:
        """Scratch of one worker, a multiple of 64."""
        return self.x_offset + self.chunks * self.block * self.token_bytes


@dataclass(frozen=True)
class Rows:
    """One vector of weight rows: address of its first row, of that row's scales, and how many rows follow it.

    Lanes past `last` repeat that row: their results are computed and never stored.
    """

    weights: Value
    scales: Value
    last: Value


class Panels:
    """The routines of one kernel over its worker's scratch: `pack` tokens, then `multiply` panel by panel."""

    def __init__(self, e: Emitter, form: Form) -> None:
        self.e, self.form = e, form
        for count in range(1, form.tile + 1):
            self._emit_tile(count)
        full, tail = divmod(form.k, _CHUNK)
        self._lengths = [
            (length, chunks) for length, chunks in ((_CHUNK, full), (tail, 1)) if length and chunks
        ]
        for length, _ in self._lengths:
            self._emit_decode(length)
        self._emit_multiply()
        self._emit_pack()
        self.scratch = e.offset(e.arg["scratch"], e.b.mul(e.worker, const(form.scratch_bytes)))

    def rows(self, weights: Value, scales: Value, row: Value, rows: Value) -> Rows:
        """The vector of rows from `row` on of a matrix of `rows` rows (i64); past the end, its last row."""
        e, b, form = self.e, self.e.b, self.form
        end = b.sub(rows, const(1))
        row = e.minimum(row, end)
        index = b.lshr(row, const(7)) if form.spec.weight == "fp8" else row
        return Rows(
            e.offset(weights, b.mul(row, const(row_bytes(form.spec.weight, form.k)))),
            e.offset(scales, b.mul(index, const(form.scale_stride))),
            b.sub(end, row),
        )

    def pack(self, source: Callable[[Value], Value], tokens: Value) -> None:
        """Copy `tokens` (at most `form.block`) bf16 rows, K long, from the addresses `source(i)`."""
        with self.e.for_range(0, tokens) as token:
            self._call("pack", self.scratch, source(token), token, tokens)

    def multiply(self, panel: tuple[Rows, Rows], tokens: Value, ahead: tuple[Value, Value]) -> None:
        """Totals of the packed tokens x the two vectors of rows; rows from `ahead` on are prefetched meanwhile."""
        words = [word for part in panel for word in (part.weights, part.scales, part.last)]
        self._call("multiply", self.scratch, tokens, *words, *ahead)

    def total(self, token: Value, vector: int) -> Value:
        """`<lanes x float>`: what `multiply` left for one token and one vector of rows."""
        e, form = self.e, self.form
        totals = e.offset(self.scratch, const(form.totals_offset))
        index = e.b.add(e.b.mul(token, const(form.rows)), const(vector * form.lanes))
        return e.load_vec(totals, index, F32, form.lanes, align=4)

    # -- routines ----------------------------------------------------------------------------------

    def _call(self, name: str, *values: Value) -> None:
        self.e.b.call(self.e.module.globals[name], values)

    def _emit_pack(self) -> None:
        """pack(scratch, row, token, tokens): one row to x[chunk][token][:], zero past K."""
        e, form = self.e, self.form
        with e.subroutine("pack", _PTR, _PTR, I64, I64) as (scratch, row, token, tokens):
            b = e.b
            x = e.offset(scratch, const(form.x_offset))
            x = e.offset(x, b.mul(token, const(form.token_bytes)))
            stride = b.mul(tokens, const(form.token_bytes))
            chunk = const(0)
            for length, chunks in self._lengths:
                with e.for_range(chunk, b.add(chunk, const(chunks))) as chunk_index:
                    target = e.offset(x, b.mul(chunk_index, stride))
                    first = b.mul(chunk_index, const(_CHUNK))
                    for start in range(0, _CHUNK, form.lanes):
                        bits: Value = e.zeros(I16, form.lanes)
                        if start < length:
                            index = b.add(first, const(start))
                            bits = masked_vec(e, row, index, I16, form.lanes, length - start)
                        value = bits if form.dot else e.bf16_to_f32(bits)
                        e.store(value, target, const(start), align=2)
                chunk = const(chunks)

    def _emit_multiply(self) -> None:
        """multiply(scratch, tokens, 2 x (weights, scales, last), 2 x ahead)."""
        e, form = self.e, self.form
        kinds = [_PTR, I64, *[_PTR, _PTR, I64] * VECTORS, *[_PTR] * VECTORS]
        with e.subroutine("multiply", *kinds) as (scratch, tokens, *words):
            b = e.b
            totals = e.offset(scratch, const(form.totals_offset))
            with e.for_range(0, b.mul(tokens, const(VECTORS))) as index:
                e.store(e.zeros(F32, form.lanes), totals, b.mul(index, const(form.lanes)), align=4)
            chunk = const(0)
            for length, chunks in self._lengths:
                with e.for_range(chunk, b.add(chunk, const(chunks))) as chunk_index:
                    self._chunk(length, chunk_index, scratch, tokens, words)
                chunk = const(chunks)

    def _chunk(
        self, length: int, chunk: Value, scratch: Value, tokens: Value, words: Sequence[Value]
    ) -> None:
        """Decode one chunk of K and multiply all tokens by it."""
        e, b, form = self.e, self.e.b, self.form
        moved = b.mul(chunk, const(row_bytes(form.spec.weight, _CHUNK)))
        scales_moved = const(0)
        if form.group:
            scales_moved = b.mul(chunk, const(_CHUNK // form.group * form.scale_bytes))
        scales = e.offset(scratch, const(form.scales_offset))
        for v in range(VECTORS):
            weights, stored, last = words[3 * v : 3 * v + 3]
            lane = const(v * form.lanes * 4)
            self._call(
                f"decode{length}",
                e.offset(scratch, lane),
                e.offset(scales, lane),
                e.offset(weights, moved),
                e.offset(stored, scales_moved),
                last,
            )
        groups, steps = 1, -(-length // (form.step * _UNROLL)) * _UNROLL
        if form.dot and 0 < form.group < _CHUNK:
            groups, steps = -(-length // form.group), form.group // form.step
        fetch = [
            e.offset(pointer, b.mul(moved, const(form.lanes))) for pointer in words[3 * VECTORS :]
        ]
        x = e.offset(scratch, const(form.x_offset))
        x = e.offset(x, b.mul(chunk, b.mul(tokens, const(form.token_bytes))))
        totals = e.offset(scratch, const(form.totals_offset))
        tiles = b.udiv(b.add(tokens, const(form.tile - 1)), const(form.tile))
        with e.for_range(0, tiles) as tile:
            first = b.udiv(b.mul(tokens, tile), tiles)
            end = b.udiv(b.mul(tokens, b.add(tile, const(1))), tiles)
            # Only the first tile fetches ahead; the others touch the panel, which is in L1.
            is_first = b.icmp_signed("==", tile, const(0))
            values = [
                e.offset(totals, b.mul(first, const(form.rows * 4))),
                scratch,
                e.offset(x, b.mul(first, const(form.token_bytes))),
                scales,
                const(groups),
                const(steps),
                *(b.select(is_first, pointer, scratch) for pointer in fetch),
            ]
            self._switch_tile(b.sub(end, first), values)

    def _switch_tile(self, count: Value, values: list[Value]) -> None:
        b = self.e.b
        done = self.e.function.append_basic_block("tile.done")
        switch = b.switch(count, done)
        for number in range(1, self.form.tile + 1):
            block = self.e.function.append_basic_block("tile")
            switch.add_case(const(number), block)
            b.position_at_end(block)
            self._call(f"tile{number}", *values)
            b.branch(done)
        b.position_at_end(done)

    def _emit_tile(self, count: int) -> None:
        """tile(totals, panel, x, scales, groups, steps, 2 x ahead): one chunk added to the totals of `count` tokens."""
        e, form = self.e, self.form
        lanes = form.lanes
        kinds = [_PTR, _PTR, _PTR, _PTR, I64, I64, *[_PTR] * VECTORS]
        with e.subroutine(f"tile{count}", *kinds) as (
            totals,
            panel,
            x,
            scales,
            groups,
            steps,
            *ahead,
        ):
            b = e.b
            scaled = form.dot and form.group > 0
            cells = [(t, v) for t in range(count) for v in range(VECTORS)]

            def total_of(t: int, v: int) -> Value:
                return e.load_vec(totals, const((t * VECTORS + v) * lanes), F32, lanes, align=4)

            with e.for_range(0, groups) as group:
                sums = {
                    cell: e.local(
                        vec(F32, lanes), e.zeros(F32, lanes) if scaled else total_of(*cell)
                    )
                    for cell in cells
                }
                first = b.mul(group, steps)
                with e.for_range(first, b.add(first, steps), _UNROLL) as step:
                    for pointer in ahead:
                        self._prefetch(pointer, step)
                    panel_step = e.offset(panel, b.mul(step, const(form.rows * 4)))
                    x_step = e.offset(x, b.mul(step, const(4)))
                    for u in range(_UNROLL):
                        weights = [
                            e.load_vec(
                                panel_step, const((u * VECTORS + v) * lanes), F32, lanes, align=4
                            )
                            for v in range(VECTORS)
                        ]
                        for t in range(count):
                            index = const(t * form.token_bytes // 4 + u)
                            one = e.splat(e.load(x_step, index, F32, align=4), lanes)
                            for v in range(VECTORS):
                                slot = sums[t, v]
                                b.store(self._multiply_add(weights[v], one, b.load(slot)), slot)
                scales_row = b.mul(group, const(form.rows))
                factors = [
                    e.load_vec(scales, b.add(scales_row, const(v * lanes)), F32, lanes, align=4)
                    for v in range(VECTORS if scaled else 0)
                ]
                for t, v in cells:
                    total = b.load(sums[t, v])
                    if scaled:
                        total = e.fma(total, factors[v], total_of(t, v))
                    e.store(total, totals, const((t * VECTORS + v) * lanes), align=4)

    def _multiply_add(self, weights: Value, one: Value, total: Value) -> Value:
        if not self.form.dot:
            return self.e.fma(weights, one, total)
        pairs = (bf16_pairs(self.e, weights), bf16_pairs(self.e, one))
        return self.e.call(_DOT, total.type, total, *pairs)

    def _prefetch(self, pointer: Value, step: Value) -> None:
        """As many lines as `_UNROLL` steps of one vector of rows take, so that all steps fetch a whole chunk."""
        e, form = self.e, self.form
        size = form.lanes * row_bytes(form.spec.weight, _UNROLL * form.step * 8) // 8
        lines = -(-size // 64)
        moved = e.offset(pointer, e.b.mul(step, const(size // _UNROLL)))
        for line in range(lines):
            e.prefetch(e.offset(moved, const(line * 64)), 2)

    def _emit_decode(self, length: int) -> None:
        """decode(panel, scales, weights, stored scales, last): `length` weights of `lanes` rows."""
        e, form = self.e, self.form
        with e.subroutine(f"decode{length}", _PTR, _PTR, _PTR, _PTR, I64) as (
            panel,
            scales,
            weights,
            stored,
            last,
        ):
            order = [e.minimum(const(r), last) for r in range(form.lanes)]
            stride = const(row_bytes(form.spec.weight, form.k))
            rows = [e.offset(weights, e.b.mul(r, stride)) for r in order]
            groups = range(0, length, form.group or length)
            if form.dot:
                decode_pairs(e, form.spec.weight, panel, form.rows, rows, length)
                if form.group:
                    for index in range(len(groups)):
                        factor = self._factor(stored, order, index)
                        e.store(factor, scales, const(index * form.rows), align=4)
                return
            for index, begin in enumerate(groups):
                factor = self._factor(stored, order, index) if form.group else None
                end = min(length, begin + groups.step)
                decode_columns(e, form.spec.weight, panel, form.rows, rows, begin, end, factor)

    def _factor(self, stored: Value, order: list[Value], group: int) -> Value:
        """`<lanes x float>`: scale number `group` of the chunk for each row (fp8: the block's, for all)."""
        e, b, form = self.e, self.e.b, self.form
        if form.spec.weight == "fp8":
            return e.splat(e.load(stored, const(group), F32), form.lanes)
        bits: Value = ir.Constant(vec(I16, form.lanes), ir.Undefined)
        for r, row in enumerate(order):
            base = e.offset(stored, b.mul(row, const(form.scale_stride)))
            bits = b.insert_element(bits, e.load(base, const(group), I16), ir.Constant(I32, r))
        return e.bf16_to_f32(bits)


def ceil_div(e: Emitter, value: Value, divisor: Value) -> Value:
    """ceil(value / divisor) of non-negative i64; 0 where the divisor is 0."""
    b = e.b
    divisor = b.select(b.icmp_signed(">", divisor, const(0)), divisor, const(1))
    return b.udiv(b.add(value, b.sub(divisor, const(1))), divisor)


def load_lanes(e: Emitter, base: Value, index: Value, lanes: int, count: Value) -> Value:
    """`<lanes x float>` from element `index`; where `count` is below `lanes` only so many, then zeros."""
    slot = e.local(vec(F32, lanes))
    with e.b.if_else(e.b.icmp_signed(">=", count, const(lanes))) as (whole, part):
        with whole:
            e.b.store(e.load_vec(base, index, F32, lanes), slot)
        with part:
            pointer = e.b.bitcast(e.at(base, index, F32), vec(F32, lanes).as_pointer())
            values = [pointer, ir.Constant(I32, 1), _mask(e, count, lanes), e.zeros(F32, lanes)]
            found = e.call(f"llvm.masked.load.v{lanes}f32.p0", vec(F32, lanes), *values)
            e.b.store(found, slot)
    return e.b.load(slot)


def store_lanes(e: Emitter, value: Value, base: Value, index: Value, count: Value) -> None:
    """Store `value` (f32 or i16 lanes) at element `index`; where `count` is below its lanes only so many."""
    kind = value.type
    with e.b.if_else(e.b.icmp_signed(">=", count, const(kind.count))) as (whole, part):
        with whole:
            e.store(value, base, index)
        with part:
            pointer = e.b.bitcast(e.at(base, index, kind.element), kind.as_pointer())
            name = f"llvm.masked.store.v{kind.count}{'i16' if kind.element == I16 else 'f32'}.p0"
            mask = _mask(e, count, kind.count)
            e.call(name, ir.VoidType(), value, pointer, ir.Constant(I32, 1), mask)


def _mask(e: Emitter, count: Value, lanes: int) -> Value:
    """The first `count` lanes."""
    order = ir.Constant(vec(I32, lanes), [ir.Constant(I32, lane) for lane in range(lanes)])
    return e.b.icmp_signed("<", order, e.splat(e.b.trunc(count, I32), lanes))
