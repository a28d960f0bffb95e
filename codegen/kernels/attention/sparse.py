"""Latent attention to chosen positions: `mla_gather`, after which the kernels of decode
(attention.py) read a token's rows as a cache of its own; and `sparse_mla_prefill`, which calls them
all for the tokens of a prompt.

Positions are read from memory: one that is not before the token's own, which no kernel of hmc
writes, is taken for the token's own, so that nothing beyond the sequence is ever read.

A worker of `sparse_mla_prefill` takes some tokens at a time through all kernels: kv_b is read once
for these, and they attend one after the other, each to its own rows, which stay in cache. Keys and
values are not lifted: 128 heads of DeepSeek-V3 that attend to 2048 positions take 0.57 GFLOP
absorbed, and lifting alone 0.54.
"""

from __future__ import annotations

from hmc.codegen.ir import I16, I32, Emitter, Value, const
from hmc.codegen.kernels.attention.attend import attention_scratch_bytes
from hmc.codegen.kernels.attention.attend_rows import Pages
from hmc.codegen.kernels.attention.attention import (
    emit_mla_attention,
    emit_mla_attention_join,
    emit_mla_up,
)
from hmc.codegen.kernels.attention.prefill import dense_tokens
from hmc.codegen.kernels.matmul.absorb import emit_mla_absorb
from hmc.codegen.ragged import ceil_div
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import for_strips, load_part, store_part


def gathered_rows(spec: KernelSpec) -> int:
    """Rows that a token has room for: whole pages."""
    return -(-spec["index_topk"] // spec["block"]) * spec["block"]


def gathered_bytes(spec: KernelSpec) -> int:
    """Bytes of the rows of one token."""
    return 2 * gathered_rows(spec) * (spec["rank"] + spec["rope"])


def emit_mla_gather(e: Emitter) -> None:
    """`mla_gather`: split by (token, row)."""
    b, spec, most = e.b, e.spec, const(e.spec["index_topk"])
    width, size = spec["rank"] + spec["rope"], gathered_bytes(spec)
    lanes = 2 * e.lanes
    start, stop = e.split(b.mul(e.arg["tokens"], most))
    with e.for_range(start, stop) as item:
        token, number = b.udiv(item, most), b.urem(item, most)
        last = e.load_int(e.arg["positions"], token)
        kept = _kept(e, last)
        with b.if_then(b.icmp_signed("==", number, const(0))):
            e.store_int(kept, e.arg["lasts"], token)
        with b.if_then(b.icmp_signed("<=", number, kept)):
            position = e.load_int(e.row("chosen", token, element=I32), number)
            position = b.select(b.icmp_unsigned("<=", position, last), position, last)
            row = Pages(e, token, spec["block"], 1).row(position, const(0))
            source = e.offset(e.arg["cache"], b.mul(row, const(2 * width)))
            at = b.add(b.mul(token, const(size)), b.mul(number, const(2 * width)))
            target = e.offset(e.arg["gathered"], at)

            def strip(index: Value, count: int, way: int) -> None:
                value = load_part(e, source, index, I16, count, lanes)
                store_part(e, value, target, index, count)

            for_strips(e, width, lanes, strip, 2)


def _kept(e: Emitter, last: Value) -> Value:
    """How many rows a token at position `last` chose, less one: all, or `index_topk`; of pools as
    many whole ones, and what there is of the one that is open.
    """
    b, most, pool = e.b, e.spec["index_topk"], e.spec.get("pool", 1)
    open_ = b.urem(e.positive(b.add(last, const(1))), const(pool))
    some = b.add(open_, const(most - pool))
    return b.select(b.icmp_signed("<", last, const(most)), last, some)


def _places(spec: KernelSpec) -> dict[str, int]:
    """Where a worker's scratch holds what, and its end: absorbed queries and results of tokens; of
    one token its rows, their page table and last position, and its records.
    """
    latents = spec["tokens"] * spec["heads"] * spec["rank"]
    sizes = {
        "q_latent": 4 * latents,
        "y_latent": 2 * latents,
        "gathered": gathered_bytes(spec),
        "tables": 4 * gathered_rows(spec) // spec["block"],
        "lasts": 4,
        "scratch": attention_scratch_bytes(spec, 1, spec["index_topk"]),
    }
    found, at = {}, 0
    for name, size in sizes.items():
        found[name] = at
        at += size + 63 & ~63
    return found | {"end": at}


def sparse_scratch_bytes(spec: KernelSpec) -> int:
    """Bytes of `scratch` of `sparse_mla_prefill` for each worker."""
    return _places(spec)["end"]


def emit_sparse_mla_prefill(e: Emitter) -> None:
    """`sparse_mla_prefill`: workers take blocks of tokens in turn, of as many as there are for each
    worker, up to `tokens`.
    """
    b, spec = e.b, e.spec
    places = _places(spec)
    own = e.offset(e.arg["scratch"], b.mul(e.worker, const(places["end"])))
    held = {name: e.offset(own, const(at)) for name, at in places.items()}
    with e.for_range(0, gathered_rows(spec) // spec["block"]) as page:
        e.store_int(page, held["tables"], page)
    first = dense_tokens(e)
    rest = b.sub(e.arg["tokens"], first)
    each = e.minimum(ceil_div(e, rest, e.workers), const(spec["tokens"]))
    with e.for_range(e.worker, ceil_div(e, rest, each), e.workers) as number:
        start = b.mul(number, each)
        count = e.minimum(b.sub(rest, start), each)
        _block(e, held, b.add(first, start), count)


def _block(e: Emitter, held: dict[str, Value], first: Value, count: Value) -> None:
    """`count` tokens from `first` on."""
    b, spec = e.b, e.spec
    latents = spec["heads"] * spec["rank"]

    def moved(name: str, token: Value, size: int) -> Value:
        return e.offset(e.arg[name], b.mul(b.mul(token, e.arg[f"{name}_stride"]), const(size)))

    weights = {"w": e.arg["w"], "scale": e.arg["w_scale"], "tokens": count}
    scale, queries = e.arg["scale"], moved("q", first, 4)
    with e.alone(**weights, q=queries, q_latent=held["q_latent"]):
        emit_mla_absorb(e)
    with e.for_range(0, count) as index:
        token = b.add(first, index)
        one = {
            "q": moved("q", token, 4),
            "q_latent": e.offset(held["q_latent"], b.mul(index, const(4 * latents))),
            "y_latent": e.offset(held["y_latent"], b.mul(index, const(2 * latents))),
            "chosen": moved("chosen", token, 4),
            "tokens": const(1),
            "lasts": held["lasts"],
            "gathered": held["gathered"],
        }
        here = {name: e.offset(e.arg[name], b.mul(token, const(4))) for name in _BY_TOKEN}
        with e.alone(**one, **here):
            emit_mla_gather(e)
        # the rows as a cache: the first page of the table is 0, and so is the one sequence
        with e.alone(
            **one,
            cache=held["gathered"],
            tables=held["tables"],
            table_stride=const(1),
            sequence=held["tables"],
            positions=held["lasts"],
            scratch=held["scratch"],
            scale=scale,
        ):
            emit_mla_attention(e)
            emit_mla_attention_join(e)
    y = moved("y", first, 2)
    with e.alone(**weights, y_latent=held["y_latent"], y=y):
        emit_mla_up(e)


_BY_TOKEN = ("sequence", "positions")
