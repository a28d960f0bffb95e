"""What `quantization_config` promises about a checkpoint's weights; hides its dialects.

Two dialects are read: `fp8` (DeepSeek's, written by transformers too) and `compressed-tensors`,
whose FP8 block and packed INT4 forms hmc has kernels for. Whatever else a checkpoint asks for is an
`UnsupportedError` that names it: no weight is ever read under a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.jsonfile import quote
from hmc.errors import ConfigError, UnsupportedError

BLOCK = 128
"""Rows and columns of an FP8 scale block; the only size there are kernels for."""

GROUP_SIZES = (32, 128)
"""Columns that share one INT4 scale."""

Kind = Literal["none", "fp8", "int4"]


def _nothing(module: str) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Quantization:
    """The one low-precision format of a checkpoint, and the modules kept out of it.

    `block` is the scale block of fp8 (128, both ways) or the group size of int4 along the input
    dimension, 0 for kind none. `scale_suffix` follows the weight's name in that of its scales.
    `skip_key` is the key that lists the kept-out modules, `skip_list` what it lists.
    """

    kind: Kind = "none"
    block: int = 0
    scale_suffix: str = ""
    skip_key: str = ""
    skip_list: tuple[str, ...] = ()
    _matcher: Callable[[str], bool] = field(default=_nothing, repr=False, compare=False)

    def skips(self, module: str) -> bool:
        """Whether the configuration keeps `module` ("model.layers.3.mlp.gate") unquantised."""
        return self._matcher(module)


def read_quantization(config: ModelConfig) -> Quantization:
    """The `quantization_config` (or `compression_config`) of a model, checked.

    Raises `ConfigError` for a malformed one and `UnsupportedError` for a method, format, block or
    group size without kernels.
    """
    section = config.section("quantization_config") or config.section("compression_config")
    if section is None:
        return Quantization()
    method = section.get_str("quant_method", "")
    if not method and ("config_groups" in section or "quantization_config" in section):
        method = "compressed-tensors"  # compression_config leaves it out
    if method == "fp8":
        return _read_fp8(section)
    if method == "compressed-tensors":
        return _read_compressed_tensors(section)
    raise _unsupported(section, "quant_method", "fp8 and compressed-tensors")


def _read_fp8(section: ModelConfig) -> Quantization:
    if section.get_str("fmt", "e4m3") != "e4m3":
        raise _unsupported(section, "fmt", "e4m3")
    if "weight_block_size" not in section:
        raise UnsupportedError(
            f"{section.path}: {section.prefix}weight_block_size is missing: per-tensor FP8 has no"
            f" kernels, blocks of [{BLOCK}, {BLOCK}] do"
        )
    if section.get_ints("weight_block_size") != (BLOCK, BLOCK):
        raise _unsupported(section, "weight_block_size", f"[{BLOCK}, {BLOCK}]")
    if section.get_str("activation_scheme", "dynamic") != "dynamic":
        raise _unsupported(section, "activation_scheme", "dynamic")
    if section.get_str("expert_dtype", "fp8") != "fp8":
        raise _unsupported(section, "expert_dtype", "fp8")
    if section.get_strs("modules_to_convert"):
        raise _unsupported(section, "modules_to_convert", "none")
    key = "modules_to_not_convert"
    if key not in section and "ignored_layers" in section:
        key = "ignored_layers"
    patterns = section.get_strs(key)
    # Without a list, transformers keeps the output embedding out (get_keys_to_not_convert).
    listed = key in section
    return Quantization(
        kind="fp8",
        block=BLOCK,
        scale_suffix="_scale_inv",
        skip_key=key if listed else "",
        skip_list=patterns,
        _matcher=_prefix_matcher(section, key, patterns if listed else ("lm_head",)),
    )


def _read_compressed_tensors(section: ModelConfig) -> Quantization:
    # transformers up to 4.47 nested the quantisation beside a sparsity_config.
    sparsity = section.section("sparsity_config")
    if sparsity is not None and sparsity.get_str("format", "dense") != "dense":
        raise _unsupported(sparsity, "format", "dense")
    section = section.section("quantization_config") or section
    if section.section("kv_cache_scheme") is not None:
        raise _unsupported(section, "kv_cache_scheme", "null")
    weights, format_name = _single_group(section)
    patterns = section.get_strs("ignore")
    if weights.get_int("num_bits", 8) == 8 and weights.get_str("type", "int") == "float":
        kind, block = _float_blocks(section, weights, format_name)
    else:
        kind, block = _packed_groups(section, weights, format_name)
    return Quantization(
        kind=kind,
        block=block,
        scale_suffix="_scale",
        skip_key="ignore",
        skip_list=patterns,
        _matcher=_exact_matcher(section, patterns),
    )


def _single_group(section: ModelConfig) -> tuple[ModelConfig, str]:
    """The `weights` of the only config group, and the format its tensors are stored in."""
    groups = section.section("config_groups")
    if groups is None or not groups.values:
        raise section.error("config_groups", "is missing")
    if len(groups.values) > 1:
        names = ", ".join(sorted(groups.values))
        raise UnsupportedError(
            f"{section.path}: {groups.prefix}* are {len(groups.values)} groups ({names}); hmc reads"
            " checkpoints with one"
        )
    group = groups.section(next(iter(groups.values)))
    weights = group.section("weights") if group is not None else None
    if group is None or weights is None:
        raise section.error("config_groups", "has no weights")
    if group.get_strs("targets") != ("Linear",):
        raise _unsupported(group, "targets", '["Linear"]')
    holder = group if "format" in group else section
    return weights, holder.require_str("format")


def _float_blocks(section: ModelConfig, weights: ModelConfig, format_name: str) -> tuple[Kind, int]:
    if format_name != "float-quantized":
        raise _unsupported(section, "format", "float-quantized (for FP8)")
    if weights.get_str("strategy", "tensor") != "block":
        raise _unsupported(weights, "strategy", "block (for FP8)")
    if weights.get_ints("block_structure") != (BLOCK, BLOCK):
        raise _unsupported(weights, "block_structure", f"[{BLOCK}, {BLOCK}]")
    return "fp8", BLOCK


def _packed_groups(
    section: ModelConfig, weights: ModelConfig, format_name: str
) -> tuple[Kind, int]:
    if format_name != "pack-quantized":
        raise _unsupported(section, "format", "pack-quantized and float-quantized")
    if weights.get_int("num_bits", 8) != 4:
        raise _unsupported(weights, "num_bits", "4")
    if weights.get_str("type", "int") != "int":
        raise _unsupported(weights, "type", "int")
    if not weights.get_bool("symmetric", True):
        raise _unsupported(weights, "symmetric", "true (no zero points)")
    if weights.get_str("strategy", "tensor") != "group":
        raise _unsupported(weights, "strategy", "group")
    group_size = weights.get_int("group_size", 0, minimum=-1)
    if group_size not in GROUP_SIZES:
        raise _unsupported(weights, "group_size", " and ".join(map(str, GROUP_SIZES)))
    order = weights.values.get("actorder")
    # "static" ("weight" of old) only changed how scales were found; columns stay in order.
    if order not in (None, False, "static", "weight"):
        raise _unsupported(weights, "actorder", "null, static and weight")
    return "int4", group_size


def _prefix_matcher(
    section: ModelConfig, key: str, patterns: tuple[str, ...]
) -> Callable[[str], bool]:
    """The rule of transformers' `should_convert_module` for `modules_to_not_convert`.

    A pattern is a regex that matches from the start of a module's name to a boundary of it
    ("layers.1" is not "layers.11"), or a plain suffix of the name ("gate").
    """
    if not patterns:
        return _nothing
    joined = "|".join(f"(?:{_checked(section, key, pattern)})" for pattern in patterns)
    matches = re.compile(rf"(?:{joined})(?:(?<=\.)|(?=\.|$))").match
    return lambda module: module.endswith(patterns) or matches(module) is not None


def _exact_matcher(section: ModelConfig, patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """The rule of compressed-tensors for `ignore`: "re:" and a regex matched from the start, or
    the whole name of a module."""
    if "Linear" in patterns:
        raise _unsupported(section, "ignore", "module names, not the class Linear")
    names = frozenset(pattern for pattern in patterns if not pattern.startswith("re:"))
    regexes = [
        _checked(section, "ignore", pattern[3:]) for pattern in patterns if pattern not in names
    ]
    if not regexes:
        return names.__contains__
    matches = re.compile("|".join(f"(?:{regex})" for regex in regexes)).match
    return lambda module: module in names or matches(module) is not None


def _checked(section: ModelConfig, key: str, pattern: str) -> str:
    try:
        re.compile(pattern)
        re.compile(f"(?:{pattern})")  # as it will stand beside others: no global flags
    except re.error as problem:
        raise ConfigError(
            f"{section.path}: {section.prefix}{key}: {quote(pattern)} is no regex: {problem}"
        ) from None
    return pattern


def _unsupported(section: ModelConfig, key: str, supported: str) -> UnsupportedError:
    value = section.values.get(key)
    return UnsupportedError(
        f"{section.path}: {section.prefix}{key} is {quote(value)}; hmc reads {supported}"
    )
