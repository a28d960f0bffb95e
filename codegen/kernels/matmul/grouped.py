"""`grouped_gate_up` and `grouped_down`: routed experts on many tokens, which come sorted by expert.

Gate and up: a panel is one vector of gate rows beside the same rows of up, so activation and
product happen where the sums are; without a gate it is two vectors of up's rows. Workers share
(expert, panel) in one line, by tokens. Down: each worker owns a slice of output rows for all
experts and adds `routing * result` to y in ascending expert order: no second pass, no atomics, and
the same sums for any number of workers. Slots that `sort_experts` left out (experts computed
elsewhere) add nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from hmc.codegen.expr import has_gate, parse, weighs
from hmc.codegen.ir import F32, I8, I16, I64, Emitter, Value, const
from hmc.codegen.kernels.matmul.experts import BIASES, DOWN, GATE, TABLE_WIDTH, UP
from hmc.codegen.kernels.matmul.gate_up import activated
from hmc.codegen.panel.panel import Panels, Rows
from hmc.codegen.panel.tiling import VECTORS, Form
from hmc.codegen.ragged import ceil_div, load_lanes, store_lanes

_DECODE_TOKENS = 6
"""Decoding a panel costs about as much as multiplying this many tokens by it; for balance only."""


def emit_grouped_gate_up(e: Emitter) -> None:
    """IR of `grouped_gate_up`: expr of gate, up and weight; params k, n (intermediate), top_k,
    experts (, biased).

    int4 also takes group and scale_dtype.
    """
    spec = e.spec
    b, tree, weighed = e.b, parse(spec.expr), weighs(spec.expr)
    panels = Panels(e, Form.of(spec))
    lanes, n = panels.form.lanes, spec["n"]
    gated = has_gate(spec.expr)
    columns, wide = ((GATE, UP), lanes) if gated else ((UP, UP), panels.form.rows)
    firsts = [const(0 if gated else v * lanes) for v in range(VECTORS)]
    count = -(-n // wide)
    costs = e.local(I64, const(0))
    with e.for_range(0, spec["experts"]) as expert:
        b.store(b.add(b.load(costs), _cost(e, _tokens(e, expert)[1])), costs)
    whole = b.mul(b.load(costs), const(count))
    low = b.sdiv(b.mul(whole, e.worker), e.workers)
    high = b.sdiv(b.mul(whole, b.add(e.worker, const(1))), e.workers)
    before = e.local(I64, const(0))
    with e.for_range(0, spec["experts"]) as expert:
        first, tokens = _tokens(e, expert)
        cost = _cost(e, tokens)
        # Panel p starts at before + p * cost: it belongs to the worker in whose share that lies.
        start, stop = (
            _clamp(
                e, ceil_div(e, _clamp(e, b.sub(edge, b.load(before)), whole), cost), const(count)
            )
            for edge in (low, high)
        )
        b.store(b.add(b.load(before), b.mul(cost, const(count))), before)

        def body(
            panel: Value, at: Value, here: Value, expert: Value = expert, stop: Value = stop
        ) -> None:
            row = b.mul(panel, const(wide))
            low, high = (
                _rows(e, panels, expert, column, b.add(row, first))
                for column, first in zip(columns, firsts, strict=True)
            )
            following = b.add(panel, const(1))
            ahead = [
                _ahead(e, panels, expert, column, following, stop, wide, const(0), first)
                for column, first in zip(columns, firsts, strict=True)
            ]
            with e.for_range(0, here) as token:
                index = b.add(b.mul(_slot(e, b.add(at, token)), const(n)), row)
                e.prefetch(e.at(e.arg["act"], index, I16), 2)
            panels.multiply((low, high), here, (ahead[0], ahead[1]))
            # one vector of results made of both, or one of each
            vectors = [tuple(range(VECTORS))] if gated else [(v,) for v in range(VECTORS)]
            starts = [b.add(row, firsts[each[0]]) for each in vectors]
            biases = [
                _biases(e, BIASES[-len(each) :], expert, start, lanes)
                for each, start in zip(vectors, starts, strict=True)
            ]
            with e.for_range(0, here) as token:
                slot = _slot(e, b.add(at, token))
                share = e.load(e.arg["routing"], slot, F32, align=4) if weighed else None
                for each, start, added in zip(vectors, starts, biases, strict=True):
                    products = (panels.total(token, v) for v in each)
                    value = activated(e, tree, products, added, share)
                    index = b.add(b.mul(slot, const(n)), start)
                    left = b.sub(const(n), start)
                    store_lanes(e, e.f32_to_bf16(value), e.arg["act"], index, left)

        def source(slot: Value) -> Value:
            token = b.udiv(slot, const(spec["top_k"]))
            return e.offset(e.arg["x"], b.mul(token, b.mul(e.arg["x_stride"], const(2))))

        besides = [_matrix(e, expert, column)[1] for column in columns]
        _expert(e, panels, first, tokens, start, stop, source, besides, body)


def emit_grouped_down(e: Emitter) -> None:
    """IR of `grouped_down`: params k (intermediate), n, top_k, experts (, biased); int4 too."""
    b, spec = e.b, e.spec
    panels = Panels(e, Form.of(spec))
    form = panels.form
    lanes, n = form.lanes, spec["n"]
    start, stop = e.split(const(-(-n // form.rows)))
    with e.for_range(0, e.arg["tokens"]) as token:
        line = b.mul(token, e.arg["y_stride"])
        with e.for_range(
            b.mul(start, const(form.rows)), b.mul(stop, const(form.rows)), lanes
        ) as row:
            left = b.sub(const(n), row)
            store_lanes(e, e.zeros(F32, lanes), e.arg["y"], b.add(line, row), left)
    with e.for_range(0, spec["experts"]) as expert:
        first, tokens = _tokens(e, expert)

        def body(panel: Value, at: Value, here: Value, expert: Value = expert) -> None:
            row = b.mul(panel, const(form.rows))
            starts = [b.add(row, const(v * lanes)) for v in range(VECTORS)]
            low, high = (_rows(e, panels, expert, DOWN, at_row) for at_row in starts)
            following = b.add(panel, const(1))
            ahead = [
                _ahead(e, panels, expert, DOWN, following, stop, form.rows, start, const(v * lanes))
                for v in range(VECTORS)
            ]
            with e.for_range(0, here) as token:
                slot = _slot(e, b.add(at, token))
                line = b.mul(b.udiv(slot, const(spec["top_k"])), e.arg["y_stride"])
                for at_row in starts:
                    e.prefetch(e.at(e.arg["y"], b.add(line, at_row), F32), 2)
            panels.multiply((low, high), here, (ahead[0], ahead[1]))
            biases = [_biases(e, ("bias",), expert, at_row, lanes) for at_row in starts]
            with e.for_range(0, here) as token:
                slot = _slot(e, b.add(at, token))
                weight = e.splat(e.load(e.arg["routing"], slot, F32, align=4), lanes)
                line = b.mul(b.udiv(slot, const(spec["top_k"])), e.arg["y_stride"])
                for v, at_row in enumerate(starts):
                    index, left = b.add(line, at_row), b.sub(const(n), at_row)
                    old = load_lanes(e, e.arg["y"], index, lanes, left)
                    value = panels.total(token, v)
                    for bias in biases[v]:
                        value = b.fadd(value, bias)
                    store_lanes(e, e.fma(weight, value, old), e.arg["y"], index, left)

        def source(slot: Value) -> Value:
            return e.offset(e.arg["act"], b.mul(slot, const(2 * spec["k"])))

        besides = [_matrix(e, expert, DOWN)[1]]
        _expert(e, panels, first, tokens, start, stop, source, besides, body)


def _biases(
    e: Emitter, names: tuple[str, ...], expert: Value, row: Value, lanes: int
) -> list[Value]:
    """Biases of an expert's rows from `row` on, of each of `names`; none where it has none."""
    if not e.spec.get("biased"):
        return []
    n = e.spec["n"]
    place = e.b.add(e.b.mul(expert, const(n)), row)
    return [load_lanes(e, e.arg[name], place, lanes, e.b.sub(const(n), row)) for name in names]


def _tokens(e: Emitter, expert: Value) -> tuple[Value, Value]:
    """Where the slots of `expert` start, and how many there are."""
    first, end = (e.load_int(e.arg["offsets"], e.b.add(expert, const(i)), align=4) for i in (0, 1))
    return first, e.b.sub(end, first)


def _slot(e: Emitter, position: Value) -> Value:
    return e.load_int(e.arg["slots"], position, align=4)


def _cost(e: Emitter, tokens: Value) -> Value:
    """What a panel of an expert with `tokens` tokens costs; 0 without any."""
    none = e.b.icmp_signed("==", tokens, const(0))
    return e.b.select(none, const(0), e.b.add(tokens, const(_DECODE_TOKENS)))


def _clamp(e: Emitter, value: Value, high: Value) -> Value:
    """`value` within [0, high]."""
    return e.minimum(e.positive(value), high)


def _rows(e: Emitter, panels: Panels, expert: Value, column: int, row: Value) -> Rows:
    """The vector of rows from `row` on of one matrix of `expert`."""
    return panels.rows(*_matrix(e, expert, column), row, const(e.spec["n"]))


def _matrix(e: Emitter, expert: Value, column: int) -> tuple[Value, Value]:
    """i8* of one matrix of `expert` and of what lies beside it."""
    place = e.b.mul(expert, const(TABLE_WIDTH))
    words = (
        e.load(e.arg["table"], e.b.add(place, const(column + i)), I64, align=8) for i in (0, 1)
    )
    codes, beside = (e.b.inttoptr(word, I8.as_pointer()) for word in words)
    return codes, beside


def _ahead(
    e: Emitter,
    panels: Panels,
    expert: Value,
    column: int,
    panel: Value,
    stop: Value,
    rows: int,
    start: Value,
    skipped: Value,
) -> Value:
    """Rows to prefetch: of `panel` those after `skipped`, or past this worker's share, of the next
    expert's `start`.
    """
    b = e.b
    inside = b.icmp_signed("<", panel, stop)
    last = const(e.spec["experts"] - 1)
    expert = b.select(inside, expert, e.minimum(b.add(expert, const(1)), last))
    row = b.add(b.mul(b.select(inside, panel, start), const(rows)), skipped)
    return _rows(e, panels, expert, column, row).weights


def _expert(
    e: Emitter,
    panels: Panels,
    first: Value,
    tokens: Value,
    start: Value,
    stop: Value,
    source: Callable[[Value], Value],
    besides: list[Value],
    body: Callable[[Value, Value, Value], None],
) -> None:
    """For each block of tokens: pack them for the matrices `besides`, then `body(panel, first
    position, tokens)` for each panel.
    """
    b = e.b
    some = b.and_(b.icmp_signed("<", start, stop), b.icmp_signed(">", tokens, const(0)))
    with b.if_then(some):
        blocks = ceil_div(e, tokens, const(panels.form.block))
        with e.for_range(0, blocks) as block:
            begin = b.udiv(b.mul(tokens, block), blocks)
            end = b.udiv(b.mul(tokens, b.add(block, const(1))), blocks)
            at, here = b.add(first, begin), b.sub(end, begin)
            panels.pack(lambda token: source(_slot(e, b.add(at, token))), here, besides)
            with e.for_range(start, stop) as panel:
                body(panel, at, here)
