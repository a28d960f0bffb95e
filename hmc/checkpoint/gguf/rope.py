"""Rotary embedding that metadata and tensors of GGUF files say more of than one base: settings by
type of layer, and factors of frequencies.
"""

from __future__ import annotations

import math

from hmc.checkpoint.gguf.families import Facts, Values, rope_scaling, rotated_share
from hmc.errors import UnsupportedError

FACTORS = "rope_freqs.weight"
"""The tensor of numbers that frequencies are divided by."""


def by_layer_type(facts: Facts, size: int) -> Values:
    """`rope_parameters` of full layers, which have the scaling of frequencies, and of sliding ones,
    of heads of `size` elements.
    """
    base = facts.number("rope.freq_base", 10000.0)
    full = {
        "rope_type": "default",
        "rope_theta": base,
        "partial_rotary_factor": rotated_share(facts, size),
        **rope_scaling(facts).get("rope_scaling", {}),
    }
    sliding = {
        "rope_type": "default",
        "rope_theta": facts.number("rope.freq_base_swa", base),
        "partial_rotary_factor": rotated_share(facts, size, "rope.dimension_count_swa"),
    }
    kinds = {"full_attention": full, "sliding_attention": sliding}
    return {"rope_scaling": None, "rope_parameters": kinds}


def llama3(facts: Facts, low: float, high: float, original: int) -> Values:
    """`rope_scaling` of type llama3 where there are factors, which are those of published models
    with `low` and `high` turns in a context of `original` tokens: the converter makes them for
    whole heads, and hmc makes them anew for what of a head is rotated.

    Raises `UnsupportedError` for other factors.
    """
    if FACTORS not in facts.tensors:
        return {}
    found = facts.floats(FACTORS)
    factor, size = max(found, default=1.0), 2 * len(found)
    base = max(facts.number("rope.freq_base"), 1.0)
    fits = size == facts.whole("attention.key_length") and 1 <= factor < math.inf
    if not fits or not all(
        math.isclose(
            each,
            _slower(
                2 * math.pi * base ** (2 * pair / size), factor, original / low, original / high
            ),
            rel_tol=1e-3,
        )
        for pair, each in enumerate(found)
    ):
        raise UnsupportedError(
            f"{facts.settings.path}: tensor {FACTORS!r}: other factors than those of rope_type"
            f" llama3 with {low:g} to {high:g} turns in {original} tokens"
        )
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
    return {"rope_scaling": scaling}


def _slower(wavelength: float, factor: float, longest: float, shortest: float) -> float:
    """What the frequency of a `wavelength` is divided by (Llama 3.1): nothing up to `shortest`, all
    beyond `longest`, in tokens.
    """
    if wavelength < shortest:
        return 1.0
    if wavelength > longest:
        return factor
    turns, low, high = 1 / wavelength, 1 / longest, 1 / shortest
    smooth = (turns - low) / (high - low) if high > low else 1.0
    return 1 / ((1 - smooth) / factor + smooth)
