"""`mla_prefill`: causal latent attention of a chunk of one sequence over the paged cache, expanded.

Of the two equal forms of latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.2) a chunk
takes the one with fewer products: keys and values of every head are lifted from the cached latents.
None are kept: workers share units (prefill_units.py) of one head and as many tokens as can be, and
a unit lifts one tile of 192 positions at a time (prefill_latent.py) and takes all its queries
through it, as `attention_prefill` does. So memory is that of a unit, whatever the context.

Lifting a position costs as much as `_lift` (for DeepSeek-V3 409) queries that see it; tokens are
only divided between units where that keeps more workers busy.

Queries enter in one bf16 term, as in decode: against float64 at DeepSeek-V3's widths the relative
error is 3.4e-3 to 3.8e-3 (two terms: 2.9e-3; BF16 throughout with f32 scores: 3.7e-3 to 4.0e-3,
with bf16 scores as transformers computes them 7e-3 to 1e-2), and logits differ from transformers'
in FP32 as little as with all products in f32.

Zen 4, two cores, 16 heads of DeepSeek-V3, FP8, shares of the dot-product peak in two sittings: 512
tokens 0.67 and 0.76, 512 after 1536 0.74 and 0.86, 2048 tokens 0.80 and 0.82; in the second, two
terms 0.64, 0.67 and 0.58 of the same products, key tiles of 96 0.75, 0.82 and 0.80, units of 1024
tokens 0.72 for 2048. PyTorch in f32 took 3 to 5 times as long.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmc.codegen.ir import I64, Emitter, Value, const
from hmc.codegen.kernels.attention.prefill_attention import attention_prefill
from hmc.codegen.kernels.attention.prefill_form import Form, lift_form
from hmc.codegen.kernels.attention.prefill_latent import LatentKeys
from hmc.codegen.kernels.attention.prefill_units import attend_units
from hmc.codegen.ragged import ceil_div
from hmc.codegen.spec import KernelSpec

Array = NDArray[Any]

_CHOICES = 8
"""Numbers of blocks of tokens that are weighed against each other, from the least on."""


def emit_mla_prefill(spec: KernelSpec) -> str:
    """IR of `mla_prefill`: params heads, nope, rope, v_dim, rank, block (int4: group, scale_bits).

    Scratch: what the panels of every worker take, then what its unit takes.
    """
    e = Emitter(spec)
    b, form = e.b, Form.of(spec)
    scratch = b.mul(e.workers, const(lift_form(spec).scratch_bytes))
    scratch = b.add(scratch, b.mul(e.worker, const(form.offsets["end"])))
    scratch = e.offset(e.arg["scratch"], scratch)
    keys = LatentKeys(e, form)
    attend_units(e, form, scratch, keys.pack, lambda least, most: _choose(e, form, least, most))
    return e.finish()


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


def mla_prefill(
    q: Array, cache: Array, w: Array, table: Array, past: int, scale: float, rope: int
) -> Array:
    """Reference in f64: q [tokens, heads, nope + rope] at positions past, past + 1, ...; cache
    [blocks, block, rank + rope]; w [heads, nope + v_dim, rank] (scales applied); table [n] the
    sequence's blocks. Result [tokens, heads, v_dim].
    """
    heads, nope = w.shape[0], q.shape[2] - rope
    rows = cache.astype(np.float64)
    lifted = np.einsum("nbr,hdr->nhbd", rows[..., : w.shape[2]], w)
    shared = np.repeat(rows[:, None, :, w.shape[2] :], heads, 1)
    keys = np.concatenate([lifted[..., :nope], shared], -1)
    return attention_prefill(q, keys, lifted[..., nope:], table, past, scale)
