"""What `quantization_config` promises about a checkpoint's weights; hides its dialects.

`compressed-tensors` says how its groups are quantised and which modules it ignores; all others list
`modules_to_not_convert`, as transformers does. What the numbers in it mean is asked of the formats
(`Format.find`). Whatever no format reads is an `UnsupportedError` that names it: no weight is ever
read under a guess.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.jsonfile import quote
from hmc.errors import ConfigError, UnsupportedError
from hmc.formats import FORMATS, Described, Storage


def _nothing(module: str) -> bool:
    return False


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint stores what it quantises (None: nothing), and the modules kept out of it.

    `skip_key` is the key that lists the kept-out modules.
    """

    storage: Storage | None = None
    skip_key: str = ""
    _matcher: Callable[[str], bool] = field(default=_nothing, repr=False, compare=False)

    def skips(self, module: str) -> bool:
        """Whether the configuration keeps `module` ("model.layers.3.mlp.gate") unquantised."""
        return self._matcher(module)


def read_quantization(config: ModelConfig) -> Quantization:
    """The `quantization_config` (or `compression_config`) of a model, checked.

    Raises `ConfigError` for a malformed one and `UnsupportedError` for what no format reads.
    """
    section = config.section("quantization_config") or config.section("compression_config")
    if section is None:
        return Quantization()
    method = section.get_str("quant_method", "")
    if not method and ("config_groups" in section or "quantization_config" in section):
        method = _COMPRESSED  # compression_config leaves it out
    if method == _COMPRESSED:
        return _read_compressed_tensors(section)
    storage = _storage(Described(method, section, section))
    key = "modules_to_not_convert"
    if key not in section and "ignored_layers" in section:
        key = "ignored_layers"
    patterns = section.get_strs(key)
    # Without a list, transformers keeps the output embedding out (get_keys_to_not_convert).
    listed = key in section
    matcher = _prefix_matcher(section, key, patterns if listed else ("lm_head",))
    return Quantization(storage, key if listed else "", matcher)


_COMPRESSED = "compressed-tensors"


def _storage(described: Described) -> Storage:
    """What the first format that reads a configuration says; else the first refusal."""
    refusal: UnsupportedError | None = None
    for row in FORMATS.values():
        try:
            if storage := row.find(described):
                return storage
        except UnsupportedError as error:
            refusal = refusal or error
    raise refusal or described.whole.unsupported("quant_method", f"fp8 and {_COMPRESSED}")


def _read_compressed_tensors(section: ModelConfig) -> Quantization:
    # transformers up to 4.47 nested the quantisation beside a sparsity_config.
    sparsity = section.section("sparsity_config")
    if sparsity is not None and sparsity.get_str("format", "dense") != "dense":
        raise sparsity.unsupported("format", "dense")
    section = section.section("quantization_config") or section
    if section.section("kv_cache_scheme") is not None:
        raise section.unsupported("kv_cache_scheme", "null")
    weights, packing = _single_group(section)
    patterns = section.get_strs("ignore")
    storage = _storage(Described(_COMPRESSED, section, weights, packing))
    return Quantization(storage, "ignore", _exact_matcher(section, patterns))


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
        raise group.unsupported("targets", '["Linear"]')
    holder = group if "format" in group else section
    return weights, holder.require_str("format")


def _prefix_matcher(
    section: ModelConfig, key: str, patterns: tuple[str, ...]
) -> Callable[[str], bool]:
    """The rule of transformers' `should_convert_module` for `modules_to_not_convert`.

    A pattern is a regex that matches from the start of a module's name to a boundary of it
    ("layers.1" is not "layers.11"), or a plain suffix of the name ("gate").
    """
    joined = _either(section, key, patterns)
    matches = re.compile(rf"(?:{joined})(?:(?<=\.)|(?=\.|$))").match
    return lambda module: module.endswith(patterns) or matches(module) is not None


def _exact_matcher(section: ModelConfig, patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """The rule of compressed-tensors for `ignore`: "re:" and a regex matched from the start, or
    the whole name of a module."""
    if "Linear" in patterns:
        raise section.unsupported("ignore", "module names, not the class Linear")
    names = frozenset(pattern for pattern in patterns if not pattern.startswith("re:"))
    regexes = [pattern[3:] for pattern in patterns if pattern not in names]
    matches = re.compile(_either(section, "ignore", regexes)).match
    return lambda module: module in names or matches(module) is not None


def _either(section: ModelConfig, key: str, patterns: Sequence[str]) -> str:
    """A regex for what one of several matches; for nothing, where there are none."""
    for pattern in patterns:
        try:
            re.compile(pattern)
            re.compile(f"(?:{pattern})")  # as it will stand beside others: no global flags
        except re.error as problem:
            raise ConfigError(
                f"{section.path}: {section.prefix}{key}: {quote(pattern)} is no regex: {problem}"
            ) from None
    return "|".join(f"(?:{pattern})" for pattern in patterns) or "(?!)"
