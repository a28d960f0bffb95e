"""What `quantization_config` promises about a checkpoint's weights, module by module; hides its
dialects.

Which modules a configuration speaks of is read here, a function a dialect, by the rules of
`matching.py`. What the numbers in it mean is asked of the formats (`Format.find`); several may
answer, and the tensors that are there decide (`finding.py`). Whatever no format reads is an
`UnsupportedError` that names it: no weight is ever read under a guess. What a configuration asks
for beyond weights is not done, and noted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.jsonfile import quote, read_object
from hmc.checkpoint.matching import Matcher, around, either, listed, nothing, targeted, wild
from hmc.errors import ConfigError, UnsupportedError
from hmc.formats import FORMATS, Described, Storage
from hmc.formats.dialects import COMPRESSED, NUMBERS

SIDECAR = "hf_quant_config.json"
"""Where NVIDIA's Model Optimizer describes weights, instead of or beside config.json."""

Storages = tuple[Storage, ...]


class Note(NamedTuple):
    """What was done with something that a checkpoint holds or asks for, and why."""

    subject: str
    choice: str
    reason: str


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a checkpoint stores what it quantises, and the modules kept out of it.

    `storages` are all ways that the configuration speaks of (none: nothing is quantised),
    `skip_key` is the key that lists modules kept out, `notes` say what else it asks for, and
    `beside` which tensors that are no part of a weight it explains: a regex of names and why.
    """

    storages: Storages = ()
    skip_key: str = ""
    notes: tuple[Note, ...] = ()
    beside: tuple[tuple[str, str], ...] = ()
    _skips: Matcher = field(default=nothing, repr=False, compare=False)
    _of: Callable[[str], Storages | None] | None = field(default=None, repr=False, compare=False)

    def skips(self, module: str) -> bool:
        """Whether the configuration keeps `module` ("model.layers.3.mlp.gate") unquantised."""
        return self._skips(module)

    def storages_of(self, module: str) -> Storages:
        """How the weight of `module` may be stored, what is meant first; (): it is kept out."""
        if not self.storages or self.skips(module):
            return ()
        return self.storages if self._of is None else self._of(module) or ()

    def storage_of(self, module: str) -> Storage | None:
        """How the configuration means the weight of `module` to be stored; None: as it is."""
        return next(iter(self.storages_of(module)), None)


def read_quantization(config: ModelConfig) -> Quantization:
    """The `quantization_config` (or `compression_config`) of a model, of its text half, or of the
    file `SIDECAR` beside it, checked.

    Raises `ConfigError` for a malformed one and `UnsupportedError` for what no format reads.
    """
    section = _section(config)
    if section is None:
        return Quantization()
    method = section.get_str("quant_method", "")
    if not method and ("config_groups" in section or "quantization_config" in section):
        method = COMPRESSED  # compression_config leaves it out
    if method.startswith("modelopt") or section.prefix == "quantization.":
        return _read_modelopt(section)
    if method == COMPRESSED:
        return _read_compressed_tensors(section)
    return _OTHERS.get(method, _read_listed)(config, section, method)


def _section(config: ModelConfig) -> ModelConfig | None:
    for holder in (config, config.section("text_config")):
        for key in ("quantization_config", "compression_config"):
            if holder is not None and (found := holder.section(key)) is not None:
                return found
    return _sidecar(config)


def _sidecar(config: ModelConfig) -> ModelConfig | None:
    path = config.path.with_name(SIDECAR)
    if not path.exists():
        return None
    whole = ModelConfig(path, read_object(path, ConfigError), "")
    section = whole.section("quantization")
    if section is None:
        raise whole.error("quantization", "is missing")
    return section


def _storages(described: Described) -> Storages:
    """What the formats say that read a configuration; `UnsupportedError` where none does."""
    found = tuple(storage for row in FORMATS.values() if (storage := row.find(described)))
    if found:
        return found
    section, method = described.weights, described.method
    if method not in NUMBERS:
        raise described.whole.unsupported("quant_method", ", ".join(sorted(NUMBERS)))
    said = [f"{key} {quote(section.values[key])}" for key in NUMBERS[method] if key in section]
    if described.packing:
        said.append(f"format {quote(described.packing)}")
    raise UnsupportedError(
        f"{section.path}: {section.prefix.removesuffix('.')}: no weight format that hmc reads has"
        f" {', '.join(said) or 'no numbers'}"
    )


def _joined(parts: Iterable[Storages]) -> Storages:
    return tuple(dict.fromkeys(storage for part in parts for storage in part))


def _merged(section: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    return replace(section, values={**section.values, **changes})


_OF_ACTIVATIONS = (
    r".*[._](?:activation|input|output)_(?:scale|global_scale|scale_ub|zero_point)",
    "of quantised activations, which stay BF16",
)
_OF_CACHE = (r".*\.[qkv]_(?:scale|zero_point)", "of a quantised cache, which stays BF16")


def _activations(reason: str) -> Note:
    return Note("activations", "BF16", f"{reason}: weights are read as stored, inputs stay BF16")


def _cache(section: ModelConfig, key: str) -> tuple[Note, ...]:
    if key not in section:
        return ()
    return (Note("cache", "BF16", f"{key} is ignored: keys and values stay BF16"),)


# Lists of modules kept out: fp8, fbgemm_fp8, mxfp4, awq, and formats of one's own.


def _read_listed(config: ModelConfig, section: ModelConfig, method: str) -> Quantization:
    key = "modules_to_not_convert"
    if key not in section and "ignored_layers" in section:
        key = "ignored_layers"
    # Without a list, transformers keeps the output embedding out (get_keys_to_not_convert).
    patterns = section.get_strs(key) if key in section else ("lm_head",)
    return Quantization(
        _storages(Described(method, section, section)),
        key if key in section else "",
        _skips=listed(section, key, patterns),
    )


_EXPERTS = re.compile(r"(?:.*\.)?experts(?:\.|$)")
"""Modules of routed experts, in every family; shared ones have names of their own."""


def _read_fp8(config: ModelConfig, section: ModelConfig, method: str) -> Quantization:
    found = _read_listed(config, section, method)
    storages = found.storages
    if "weight_block_size" not in section:  # then transformers takes this one
        common = _merged(section, {"weight_block_size": [128, 128]})
        storages = _joined((storages, _storages(Described(method, common, common))))
    # DeepSeek-V4 says it beside the section, its successor in it.
    kind = section.get_str("expert_dtype", config.get_str("expert_dtype", ""))
    routed = _joined((_storages(Described(method, section, section, kind)), storages))
    scheme = section.get_str("activation_scheme", "dynamic")
    return replace(
        found,
        storages=_joined((storages, routed)),
        notes=(_activations(f"activation_scheme is {scheme}"),),
        beside=(_OF_ACTIVATIONS, _OF_CACHE),
        _of=lambda module: routed if _EXPERTS.match(module) else storages,
    )


def _read_mxfp8(config: ModelConfig, section: ModelConfig, method: str) -> Quantization:
    """What transformers reads as `fp8` with an exponent for 32 of a row (MiniMax-M3)."""
    size = section.get_ints("weight_block_size") or (1, 32)
    return _read_fp8(config, _merged(section, {"weight_block_size": list(size)}), "fp8")


def _read_gptq(config: ModelConfig, section: ModelConfig, method: str) -> Quantization:
    """`dynamic` of GPTQModel: "-:" and a regex keeps modules out, "+:" or none gives them numbers
    of their own; the first that matches counts.
    """
    storages = _storages(Described(method, section, section))
    rules: list[tuple[Callable[[str], object], Storages]] = []
    dynamic = section.section("dynamic")
    for pattern in dynamic.values if dynamic is not None else ():
        assert dynamic is not None
        regex = pattern[2:] if pattern[:2] in ("-:", "+:") else pattern
        own: Storages = ()
        if not pattern.startswith("-:"):
            changes = dynamic.section(pattern)
            numbers = _merged(section, changes.values if changes is not None else {})
            own = _storages(Described(method, section, numbers))
        rules.append((re.compile(either(section, "dynamic", [regex])).match, own))
    head = section.get_bool("lm_head", False)

    def find(module: str) -> Storages:
        return next((own for matches, own in rules if matches(module)), storages)

    def skips(module: str) -> bool:
        return not find(module) or (not head and module.endswith("lm_head"))

    order = (r".*\.g_idx", "desc_act is false: columns are in the order of their groups")
    return Quantization(
        _joined((storages, *(own for _, own in rules))),
        "dynamic" if rules else "",
        beside=() if section.get_bool("desc_act", False) else (order,),
        _skips=skips,
        _of=find,
    )


_OTHERS = {"fp8": _read_fp8, "mxfp8": _read_mxfp8, "gptq": _read_gptq}


# compressed-tensors


def _read_compressed_tensors(section: ModelConfig) -> Quantization:
    # transformers up to 4.47 nested the quantisation beside a sparsity_config.
    sparsity = section.section("sparsity_config")
    if sparsity is not None and sparsity.get_str("format", "dense") != "dense":
        raise sparsity.unsupported("format", "dense")
    section = section.section("quantization_config") or section
    if (transforms := section.section("transform_config")) is not None:
        _check_transforms(transforms)
    named: dict[str, Storages] = {}
    notes: dict[Note, None] = {}
    groups = section.section("config_groups")
    if groups is None:
        raise section.error("config_groups", "is missing")
    for name in groups.values:
        group = groups.section(name)
        if group is None:
            raise groups.error(name, "is null, must be an object")
        storages = _of_group(section, group)
        if not group.get_strs("targets"):
            raise group.error("targets", "are missing")
        named.update(dict.fromkeys(group.get_strs("targets"), storages))
        if (inputs := group.section("input_activations")) is not None:
            notes[_activations(f"{inputs.prefix.removesuffix('.')} ask for {_bits(inputs)}")] = None
    notes.update(dict.fromkeys(_cache(section, "kv_cache_scheme")))
    ignored = targeted(section, "ignore", dict.fromkeys(section.get_strs("ignore"), True))
    return Quantization(
        _joined(named.values()),
        "ignore",
        tuple(notes),
        (_OF_ACTIVATIONS, _OF_CACHE),
        _skips=lambda module: ignored(module) is True,
        _of=targeted(section, "targets", named),
    )


def _check_transforms(transforms: ModelConfig) -> None:
    """Refuse transforms (rotations) that activations go through. Those of weights are in the
    weights as they are stored, on both sides of what they change, and nothing is left to do.
    """
    groups = transforms.section("config_groups")
    for name in groups.values if groups is not None else ():
        scheme = groups.section(name) if groups is not None else None
        places = scheme.values.get("apply") if scheme is not None else None
        for place in places if isinstance(places, list) and places else [None]:
            location = place.get("location") if isinstance(place, dict) else None
            if location not in ("weight_input", "weight_output"):
                raise transforms.error(
                    f"config_groups.{name}",
                    f"transforms at {location}; hmc reads those in stored weights alone",
                )


def _of_group(section: ModelConfig, group: ModelConfig) -> Storages:
    """How weights of one config group are stored; () where it is about activations alone."""
    weights = group.section("weights")
    packing = group.get_str("format", section.get_str("format", ""))
    if weights is None or packing == "dense":
        return ()
    if packing == "mixed-precision":  # of the whole: its groups' formats follow from their numbers
        packing = ""
    return _storages(Described(COMPRESSED, section, weights, packing))


def _bits(numbers: ModelConfig) -> str:
    return f"{numbers.get_int('num_bits', 8)}-bit {numbers.get_str('type', 'int')}"


# NVIDIA's Model Optimizer


def _read_modelopt(section: ModelConfig) -> Quantization:
    key = "ignore" if "ignore" in section else "exclude_modules"
    notes = _cache(section, "kv_cache_scheme") or _cache(section, "kv_cache_quant_algo")
    found = Quantization(
        (),
        key if key in section else "",
        notes,
        (_OF_ACTIVATIONS, _OF_CACHE),
        _skips=wild(section.get_strs(key)),
    )
    algorithm = section.get_str("quant_algo", "").upper()
    if algorithm == "MIXED_PRECISION":
        return _mixed_modelopt(section, found)
    if not algorithm and notes:  # the cache alone is quantised
        return found
    storages = _storages(Described("modelopt", section, section, algorithm))
    activations = _activations(f"quant_algo is {algorithm}")
    return replace(found, storages=storages, notes=(activations, *notes))


def _mixed_modelopt(section: ModelConfig, found: Quantization) -> Quantization:
    """`quantized_layers` names modules, or those around them, each with its algorithm."""
    holder = section
    if "quantized_layers" not in holder:
        holder = _sidecar(section) or section
    layers = holder.section("quantized_layers")
    if layers is None:
        raise holder.error("quantized_layers", "is missing")
    named: dict[str, Storages] = {}
    known: dict[tuple[str, int], Storages] = {}
    for name in layers.values:
        layer = layers.section(name)
        if layer is None:
            raise layers.error(name, "is null, must be an object")
        kind = layer.get_str("quant_algo", "").upper(), layer.get_int("group_size", 0)
        if kind not in known:
            known[kind] = _storages(Described("modelopt", section, layer, kind[0]))
        named[name] = known[kind]
    inside = around(named)
    patterns = [(wild([name]), each) for name, each in named.items() if "*" in name]

    def find(module: str) -> Storages:
        return inside(module) or next((each for fits, each in patterns if fits(module)), ())

    notes = (_activations("quant_algo is MIXED_PRECISION"), *found.notes)
    return replace(found, storages=_joined(named.values()), notes=notes, _of=find)
