"""`attention_prefill`: causal attention of a chunk of one sequence over the paged cache.

Workers share units (prefill_units.py): a block of tokens, all heads of one cache row. A unit packs
its queries once (prefill_rows.py); then it packs one tile of keys and values at a time
(prefill_keys.py) and takes every panel of queries through it (prefill_tiles.py).

Zen 4, 32 heads of 128 over 4 cache rows, causal FLOPs, shares of the dot-product peak at 512 and
2048 tokens: 0.52 and 0.57 with queries in two terms, 0.72 and 0.80 in one. Two are the default: in
one, a parity test against transformers misses its count of large errors by one token. In two terms,
for 128 tokens after 1920, scores take 0.60 of the time (1.01 of what their dot products must take),
values 0.31 (1.04), softmax 0.04, packing 0.05. Tried and dropped, no difference beyond the noise of
3 %: register tiles of 3 vectors x 8, key tiles of 64 to 288, units of 384 to 1024 rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmc.codegen.ir import Emitter, Value, const
from hmc.codegen.kernels.attention.attention import attention
from hmc.codegen.kernels.attention.prefill_form import Form, prefill_scratch_bytes
from hmc.codegen.kernels.attention.prefill_keys import CachedKeys
from hmc.codegen.kernels.attention.prefill_units import attend_units
from hmc.codegen.ragged import ceil_div
from hmc.codegen.spec import KernelSpec

Array = NDArray[Any]

_UNITS = 4
"""Least units of a worker, for balance, while tokens last."""


def emit_attention_prefill(spec: KernelSpec) -> str:
    """IR of `attention_prefill`: params heads, kv_heads, head_dim, v_dim, block."""
    e = Emitter(spec)
    b, form = e.b, Form.of(spec)
    scratch = e.offset(e.arg["scratch"], b.mul(e.worker, const(prefill_scratch_bytes(spec))))

    def choose(least: Value, most: Value) -> Value:
        wanted = ceil_div(e, b.mul(e.workers, const(_UNITS)), const(form.kv_heads))
        return e.minimum(b.select(b.icmp_signed("<", least, wanted), wanted, least), most)

    attend_units(e, form, scratch, CachedKeys(e, form).pack, choose)
    return e.finish()


def attention_prefill(
    q: Array, k_cache: Array, v_cache: Array, table: Array, past: int, scale: float
) -> Array:
    """Reference in f64: q [tokens, heads, head_dim] at positions past, past + 1, ...; caches
    [blocks, kv_heads, block, dim]; table [n] the sequence's blocks. Result [tokens, heads, v_dim].
    """
    tokens = len(q)
    sequence, positions = np.zeros(tokens, np.int32), np.arange(past, past + tokens)
    return attention(q, k_cache, v_cache, table[None], sequence, positions, scale)
