"""Rotary settings of a config.json -> the frequencies a `Rotary` block rotates by.

Hides the two places where checkpoints keep them (`rope_theta` beside `rope_scaling` on the hub,
`rope_parameters` since transformers 5) and the formulas of the scaling types. Frequencies are
computed in float32 with the operations of transformers, so that angles agree to the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hmc.checkpoint.config import ModelConfig
from hmc.errors import ConfigError, UnsupportedError

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "deepseek_yarn", "dynamic", "proportional")
LONGROPE = "longrope"


@dataclass(frozen=True)
class Rope:
    """`inv_freq`: radians a position, one for two of the elements that are rotated; `factor` scales
    cos and sin.

    `mscale` is YaRN's correction of the softmax temperature for models that put it into the
    attention scale (squared) rather than into cos and sin; 1 otherwise.
    """

    inv_freq: tuple[float, ...]
    factor: float = 1.0
    mscale: float = 1.0


def rope(
    config: ModelConfig,
    dim: int,
    default_theta: float = 10000.0,
    *,
    partial: float = 0.0,
    layer_type: str = "",
    longrope: Literal["", "short", "long"] = "",
) -> Rope:
    """The rotary settings of a model with heads of `dim` elements; of layers of `layer_type`, where
    the configuration tells these apart. `partial` is the family's default of
    `partial_rotary_factor`, the share of each head, its first elements, that is rotated (0: the
    family rotates whole heads). LongRoPE has two sets of factors, one for contexts up to
    `short_context` and one for longer ones: it is known to families that say which.

    Raises `UnsupportedError` for a scaling type hmc does not know, `ConfigError` for values that
    cannot be.
    """
    section = _section(config, layer_type)
    settings = section or config
    kind, known = _kind(section), (*ROPE_TYPES, LONGROPE) if longrope else ROPE_TYPES
    if kind not in known:
        raise UnsupportedError(
            f"{config.path}: {settings.prefix}rope_type {kind!r} is not one of {', '.join(known)}"
        )
    share = config.get_float("partial_rotary_factor", partial or 1.0)
    share = settings.get_float("partial_rotary_factor", share)
    if not partial and share != 1.0:
        raise UnsupportedError(
            f"{config.path}: partial_rotary_factor is {share:g}, must be 1 for this family"
        )
    rotated = int(dim * share)
    if rotated % 2 or not 0 < rotated <= dim:
        raise ConfigError(
            f"{config.path}: rotary embedding of {rotated} of {dim} elements a head, must be even"
        )
    theta = settings.get_float("rope_theta", config.get_float("rope_theta", default_theta))
    if theta <= 1:
        raise config.error("rope_theta", f"is {theta:g}, must be above 1")
    if section is not None and kind == "dynamic":
        theta *= _stretch(section, rotated)
    whole = dim if kind == "proportional" else rotated
    steps = torch.arange(0, rotated, 2, dtype=torch.float32, device="cpu") / whole
    powers = theta**steps
    if section is None or kind in ("default", "dynamic"):
        return Rope(_floats(1.0 / powers))
    if kind == "proportional":  # pairs lie half a head apart, the last ones stay where they are
        turned = _floats(1.0 / powers / section.get_float("factor", 1.0))
        return Rope((*turned, *(0.0,) * ((dim - rotated) // 2)))
    if kind == "linear":
        return Rope(_floats(1.0 / powers / _factor(section)))
    if kind == "llama3":
        return Rope(_floats(_llama3(section, 1.0 / powers, _original(config, section))))
    if kind == LONGROPE:
        return _longrope(section, powers, longrope)
    return _yarn(config, section, powers, theta)


def short_context(config: ModelConfig) -> int:
    """Tokens up to which LongRoPE takes its short factors; 0 where it is not what the configuration
    asks for.
    """
    section = _section(config, "")
    return _original(config, section) if section and _kind(section) == LONGROPE else 0


def _kind(section: ModelConfig | None) -> str:
    if section is None:
        return "default"
    return section.get_str("rope_type", section.get_str("type", "default"))


def _section(config: ModelConfig, layer_type: str) -> ModelConfig | None:
    """The object that holds the settings, where there is one: an empty one says nothing."""
    places = (config.section(key) for key in ("rope_scaling", "rope_parameters"))
    section = next((each for each in places if each is not None and each.values), None)
    if section is None:
        return None
    if layer_type and (own := section.section(layer_type)) is not None:
        return own
    for key, value in section.values.items():
        if isinstance(value, dict):
            raise UnsupportedError(
                f"{config.path}: {section.prefix}{key} sets rotary embedding by layer type,"
                " which hmc cannot for this family"
            )
    return section


def _stretch(section: ModelConfig, dim: int) -> float:
    """What NTK-aware scaling by a fixed `alpha` (Hunyuan) multiplies theta by."""
    if "alpha" not in section:
        raise section.unsupported("alpha", "dynamic scaling by a fixed alpha alone")
    alpha = section.require_float("alpha")
    if alpha <= 0 or dim <= 2:
        raise section.error("alpha", f"is {alpha:g}, must be above 0")
    return float(alpha ** (dim / (dim - 2)))


def _factor(section: ModelConfig) -> float:
    factor = section.require_float("factor")
    if factor <= 0:
        raise section.error("factor", f"is {factor:g}, must be above 0")
    return factor


def _original(config: ModelConfig, section: ModelConfig) -> int:
    """The context the model was trained with before it was stretched."""
    key = "original_max_position_embeddings"
    context = config.require_int("max_position_embeddings", minimum=1)
    return config.get_int(key, section.get_int(key, context, minimum=1), minimum=1)


def _llama3(section: ModelConfig, inv_freq: Tensor, original: int) -> Tensor:
    """Slow frequencies divided by `factor`, fast ones kept, a smooth step between the two (Llama
    3.1).
    """
    factor = _factor(section)
    low, high = section.require_float("low_freq_factor"), section.require_float("high_freq_factor")
    if not 0 < low <= high:
        raise section.error("low_freq_factor", f"is {low:g}, must be above 0, to high_freq_factor")
    wavelength = 2 * math.pi / inv_freq
    slow, fast = wavelength > original / low, wavelength < original / high
    scaled = torch.where(slow, inv_freq / factor, inv_freq)
    smooth = (original / wavelength - low) / (high - low)
    between = (1 - smooth) * scaled / factor + smooth * scaled
    return torch.where(~(slow | fast), between, scaled)


def _yarn(config: ModelConfig, section: ModelConfig, powers: Tensor, theta: float) -> Rope:
    """YaRN (arXiv 2309.00071): each frequency between kept and divided by `factor`, by its turns in
    the old context.
    """
    dim = 2 * len(powers)
    context = config.require_int("max_position_embeddings", minimum=1)
    original = _original(config, section)
    factor = _factor(section) if "factor" in section else context / original
    all_dim = section.get_float("mscale_all_dim", 0.0)
    mscale = section.get_float("mscale", 0.0)
    if "attention_factor" in section:
        attention_factor = section.require_float("attention_factor")
    elif mscale and all_dim:
        attention_factor = _mscale(factor, mscale) / _mscale(factor, all_dim)
    else:
        attention_factor = _mscale(factor, 1.0)

    def index_turning(times: float) -> float:
        return dim * math.log(original / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = index_turning(_turns(section, "beta_fast", 32.0))
    high = index_turning(_turns(section, "beta_slow", 1.0))
    if section.get_bool("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001  # a step, not a division by zero
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / (high - low)
    keep = 1 - ramp.clamp(0, 1)
    inv_freq = 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep
    return Rope(_floats(inv_freq), attention_factor, _mscale(factor, all_dim) if all_dim else 1.0)


def _turns(section: ModelConfig, key: str, default: float) -> float:
    """A number of turns; 0 is the default, as null is."""
    found = section.get_float(key, 0.0) or default
    if found < 0:
        raise section.error(key, f"is {found:g}, must be above 0")
    return found


def _longrope(section: ModelConfig, powers: Tensor, which: str) -> Rope:
    """LongRoPE (arXiv 2402.13753): a factor for each frequency, and one of cos and sin that Phi
    calls `short_mscale` and `long_mscale`.
    """
    key = f"{which}_factor"
    factors = section.values.get(key)
    if (
        not isinstance(factors, list)
        or len(factors) != len(powers)
        or not all(type(each) in (int, float) and each > 0 for each in factors)
    ):
        raise section.error(key, f"must be {len(powers)} numbers above 0")
    scale = section.require_float(f"{which}_mscale")
    slower = torch.tensor(factors, dtype=torch.float32, device="cpu")
    return Rope(_floats(1.0 / (slower * powers)), scale)


def _mscale(factor: float, weight: float) -> float:
    """YaRN's temperature correction for a context stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _floats(values: Tensor) -> tuple[float, ...]:
    return tuple(values.tolist())
