"""`attention_prefill` and `mla_prefill`: causal attention of a chunk of one sequence over the paged
cache.

Workers share units: a block of tokens, all heads of one cache row. A unit packs its queries once
(prefill_rows.py); then it packs one tile of keys and values at a time (prefill_keys.py) and takes
every panel of queries through it (prefill_tiles.py). Units are dealt largest first, back and forth
over the workers, which balances causal cost. Key tiles start at multiples of their size counted
from position 0 and what a query must not see changes nothing, so a result depends on its query and
the cache alone: never on chunk, block or workers. With bounds a unit begins at the tile of the
first position that it sees.

Grouped queries. Zen 4, 32 heads of 128 over 4 cache rows, causal FLOPs, shares of the dot-product
peak at 512 and 2048 tokens: 0.52 and 0.57 with queries in two terms, 0.72 and 0.80 in one. They
enter in two: in one, a parity test against transformers misses its count of large errors by one
token. In two terms, for 128 tokens after 1920, scores take 0.60 of the time (1.01 of what their dot
products must take), values 0.31 (1.04), softmax 0.04, packing 0.05. Tried and dropped, no
difference beyond the noise of 3 %: register tiles of 3 vectors x 8, key tiles of 64 to 288, units
of 384 to 1024 rows.

Latent attention, expanded. Of the two equal forms (DeepSeek-V2, arXiv 2405.04434, section 2.1.2) a
chunk takes the one with fewer products: keys and values of every head are lifted from the cached
latents. None are kept: units are of one head and as many tokens as can be, and a unit lifts one
tile of 192 positions at a time. So memory is that of a unit, whatever the context. Lifting a
position costs as much as `_lift` (for DeepSeek-V3 409) queries that see it; tokens are only divided
between units where that keeps more workers busy.

Its queries enter in one bf16 term, as in decode. Against float64 at DeepSeek-V3's widths the
relative error is 3.4e-3 to 3.8e-3 (two terms: 2.9e-3; BF16 throughout with f32 scores: 3.7e-3 to
4.0e-3, with bf16 scores as transformers computes them 7e-3 to 1e-2), and logits differ from those
of transformers in FP32 as little as with all products in f32.

Zen 4, two cores, 16 heads of DeepSeek-V3, FP8, shares of the dot-product peak in two sittings: 512
tokens 0.67 and 0.76, 512 after 1536 0.74 and 0.86, 2048 tokens 0.80 and 0.82; in the second, two
terms 0.64, 0.67 and 0.58 of the same products, key tiles of 96 0.75, 0.82 and 0.80, units of 1024
tokens 0.72 for 2048. PyTorch in f32 took 3 to 5 times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from math import gcd

from hmc.codegen.ir import I32, I64, Emitter, Value, const
from hmc.codegen.kernels.attention.options import first_seen
from hmc.codegen.kernels.attention.prefill_chosen import Choice
from hmc.codegen.kernels.attention.prefill_form import Form, lift_form, prefill_scratch_bytes
from hmc.codegen.kernels.attention.prefill_keys import CachedKeys, LatentKeys
from hmc.codegen.kernels.attention.prefill_rows import Unit
from hmc.codegen.kernels.attention.prefill_tiles import Tiles
from hmc.codegen.ragged import ceil_div
from hmc.codegen.spec import KernelSpec

_UNITS = 4
"""Least units of a worker for grouped queries, for balance, while tokens last."""
_CHOICES = 8
"""Numbers of blocks of tokens that are weighed against each other for latent attention, from the
least on.
"""

Pack = Callable[[Unit, Value], None]
"""Fills the scratch of a unit with the keys and values it sees, from a position on."""

Body = Callable[[Unit], None]
"""What is done for a unit."""

Divide = Callable[[Value, Value], Value]
"""How many blocks the tokens are divided into, of the least and the most there can be."""


def _attend_units(e: Emitter, form: Form, scratch: Value, pack_keys: Pack, divide: Divide) -> None:
    """Attention of all units of this worker."""
    Tiles(e, form)
    share_units(e, form, scratch, divide, lambda unit: _attend(e, form, unit, pack_keys))


def share_units(e: Emitter, form: Form, scratch: Value, divide: Divide, body: Body) -> None:
    """All units of this worker: blocks of tokens, as many as `divide(least, most)` says, by key
    heads.
    """
    b = e.b
    past = e.load_int(e.arg["positions"], const(0))

    # Blocks of whole grains; a grain is as many tokens as fill panels without a rest.
    grain = form.panel // gcd(form.panel, form.group)
    grain = grain if grain <= form.tokens else 1
    grains = ceil_div(e, e.arg["tokens"], const(grain))
    blocks = divide(ceil_div(e, grains, const(form.tokens // grain)), grains)
    total = b.mul(blocks, const(form.kv_heads))
    with e.for_range(0, ceil_div(e, total, e.workers)) as turn:
        back = b.sub(b.sub(e.workers, const(1)), e.worker)
        is_odd = b.trunc(turn, I32)
        is_odd = b.icmp_signed("==", b.and_(is_odd, I32(1)), I32(1))
        number = b.add(b.mul(turn, e.workers), b.select(is_odd, back, e.worker))
        with b.if_then(b.icmp_signed("<", number, total)):
            # Later blocks see more keys: they come first.
            block = b.sub(b.sub(blocks, const(1)), b.udiv(number, const(form.kv_heads)))
            kv_head = b.urem(number, const(form.kv_heads))

            def border(index: Value) -> Value:
                token = b.mul(b.udiv(b.mul(grains, index), blocks), const(grain))
                return e.minimum(token, e.arg["tokens"])

            first = border(block)
            count = b.sub(border(b.add(block, const(1))), first)
            body(Unit(e, form, scratch, past, first, count, kv_head))


def _attend(e: Emitter, form: Form, unit: Unit, pack_keys: Pack) -> None:
    """One unit: pack queries, go through all key tiles it sees, write its results."""
    b = e.b
    unit.pack_queries()
    choice = Choice(e, form, unit) if form.chosen else None
    tile = b.mul(b.udiv(unit.begin, const(form.keys)), const(form.keys))
    with e.for_range(tile, unit.end, form.keys) as start:
        if choice is None:
            _attend_tile(e, form, unit, pack_keys, start)
        else:
            with b.if_then(choice.enter(start)):
                _attend_tile(e, form, unit, pack_keys, start, choice)
    unit.write_results()


def _attend_tile(
    e: Emitter, form: Form, unit: Unit, pack_keys: Pack, start: Value, choice: Choice | None = None
) -> None:
    """Take every panel that sees some of the tile from position `start` through it."""
    b = e.b
    pack_keys(unit, start)
    with e.for_range(0, unit.panels) as panel:
        earliest, latest = unit.first_position(panel), unit.last_position(panel)
        count = e.minimum(b.sub(b.add(latest, const(1)), start), const(form.keys))
        whole = b.sub(b.add(start, const(form.keys)), const(1))
        some, hidden = b.icmp_signed(">", count, const(0)), b.icmp_signed(">", whole, earliest)
        if form.bounded:
            some = b.and_(some, b.icmp_signed(">=", whole, first_seen(e, earliest)))
            hidden = b.or_(hidden, b.icmp_signed("<", start, first_seen(e, latest)))
        if choice is not None:
            sees, all_see = choice.of_panel(panel)
            some, hidden = b.and_(some, sees), b.or_(hidden, b.not_(all_see))
        with b.if_then(some):
            if choice is not None:
                choice.mark(panel)
            score(e, unit, panel, start, count, hidden)
            _weigh(e, unit, panel, count)


def score(e: Emitter, unit: Unit, panel: Value, start: Value, count: Value, hidden: Value) -> None:
    """Scores of a panel for the packed tile of keys from position `start`, `count` of which some
    row of it sees; `hidden` (i1): some key of the whole tile is not for every row.
    """
    form = unit.form
    keys, weights = (unit.part(name, const(0), 0) for name in ("keys", "weights"))
    queries = unit.part("queries", panel, form.query_words)
    state = unit.part("states", panel, form.state_words)
    with e.b.if_else(hidden) as (some, none):
        for name, branch in (("scores_hidden", some), ("scores", none)):
            with branch:
                e.run(name, queries, keys, weights, state, start, count)


def _weigh(e: Emitter, unit: Unit, panel: Value, count: Value) -> None:
    """Add what a panel's scores make of the tile's values to its results."""
    form = unit.form
    values, weights = (unit.part(name, const(0), 0) for name in ("values", "weights"))
    results = unit.part("results", panel, form.result_words)
    state = unit.part("states", panel, form.state_words)
    e.run("weights", weights, state, count)
    e.run("values", weights, values, results, state, count)


def emit_attention_prefill(e: Emitter) -> None:
    """IR of `attention_prefill`: params heads, kv_heads, head_dim, v_dim, block, and options."""
    b, form = e.b, Form.of(e.spec)
    scratch = e.offset(e.arg["scratch"], b.mul(e.worker, const(prefill_scratch_bytes(e.spec))))

    def choose(least: Value, most: Value) -> Value:
        wanted = ceil_div(e, b.mul(e.workers, const(_UNITS)), const(form.kv_heads))
        return e.minimum(b.select(b.icmp_signed("<", least, wanted), wanted, least), most)

    _attend_units(e, form, scratch, CachedKeys(e, form).pack, choose)


def emit_mla_prefill(e: Emitter) -> None:
    """IR of `mla_prefill`: params heads, nope, rope, v_dim, rank, block (int4: group, scale_dtype);
    index_topk: `dense_tokens` alone.

    Scratch: what the panels of every worker take, then what its unit takes.
    """
    b, form = e.b, Form.of(e.spec)
    scratch = b.mul(e.workers, const(lift_form(e.spec).scratch_bytes))
    scratch = b.add(scratch, b.mul(e.worker, const(form.offsets["end"])))
    scratch = e.offset(e.arg["scratch"], scratch)
    keys = LatentKeys(e, form)
    tokens = dense_tokens(e)
    with b.if_then(b.icmp_signed(">", tokens, const(0))), e.given(tokens=tokens):
        _attend_units(
            e, form, scratch, keys.pack, lambda least, most: _choose(e, form, least, most)
        )


def dense_tokens(e: Emitter) -> Value:
    """How many of a call's tokens, the first ones, see all positions before them: where others
    choose, those that see no more than can be chosen.
    """
    tokens, most = e.arg["tokens"], e.spec.get("index_topk")
    if not most:
        return tokens
    past = e.load_int(e.arg["positions"], const(0))
    return e.minimum(tokens, e.positive(e.b.sub(const(most), past)))


def _lift(spec: KernelSpec, form: Form) -> int:
    """Queries whose products with a key and a value are as many as lifting both takes."""
    lifted = spec["rank"] * (spec["nope"] + spec["v_dim"])
    return lifted // (form.terms * form.key + form.value)


def _choose(e: Emitter, form: Form, least: Value, most: Value) -> Value:
    """The number of blocks of tokens for which the worker with most units has least to do: units
    of a worker x (tokens of a block + what lifting costs).
    """
    b = e.b
    best, lowest = e.local(I64, least), e.local(I64, const((1 << 63) - 1))
    stop = e.minimum(b.add(least, const(_CHOICES)), b.add(most, const(1)))
    with e.for_range(least, stop) as blocks:
        turns = ceil_div(e, b.mul(blocks, const(form.heads)), e.workers)
        tokens = b.add(ceil_div(e, e.arg["tokens"], blocks), const(_lift(e.spec, form)))
        work = b.mul(turns, tokens)
        with b.if_then(b.icmp_signed("<", work, b.load(lowest))):
            b.store(work, lowest)
            b.store(blocks, best)
    return b.load(best)
