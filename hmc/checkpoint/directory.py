"""A model directory as one object: configuration, shards, and every weight by name.

Hides how a checkpoint is spread over files: one shard, several with an index, several without.
`Checkpoint.open` reads config.json, the index and the headers, and nothing else; after it, index
and headers are known to agree.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hmc.checkpoint.config import CONFIG_NAME, ModelConfig, load_config
from hmc.checkpoint.headers import Shard, TensorInfo, read_header
from hmc.checkpoint.jsonfile import first_few, quote, read_object
from hmc.checkpoint.quantization import Quantization, read_quantization
from hmc.checkpoint.views import View
from hmc.checkpoint.weights import (
    InventedWeights,
    StoredWeights,
    Weights,
    WeightSource,
)
from hmc.errors import (
    CheckpointError,
    ConfigError,
    ShardError,
    TensorError,
    UnsupportedError,
    UsageError,
)

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_TORCH_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_NUMBERED = re.compile(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened model directory.

    `shards` are sorted by name, and `TensorInfo.shard` indexes them; `tensors` are all of theirs.
    With `dummy`, there are no shards and `resolve` invents weights.
    """

    directory: Path
    config: ModelConfig
    quantization: Quantization
    shards: tuple[Shard, ...]
    tensors: Mapping[str, TensorInfo]
    weights: Weights
    dummy: bool

    @classmethod
    def open(cls, directory: Path | str) -> Checkpoint:
        """Open a local model directory.

        Raises `UsageError` for an argument that is no directory, `ConfigError`, `ShardError` and
        `TensorError` for what is wrong inside, `UnsupportedError` for a format without kernels.
        """
        path = _local_directory(str(directory))
        config = load_config(path)
        quantization = read_quantization(config)
        shards, tensors = _read_shards(path)
        weights = StoredWeights(path, shards, tensors, quantization)
        return cls._build(path, config, quantization, shards, tensors, weights)

    @classmethod
    def from_config(cls, path: Path | str) -> Checkpoint:
        """A checkpoint of invented weights, from a config.json or a directory that holds one.

        Weights outside `quantization_config` take the config's `dtype` (BF16 if it names none).
        """
        path = Path(path)
        if not path.is_file():
            path = _local_directory(str(path)) / CONFIG_NAME
        config = load_config(path)
        quantization = read_quantization(config)
        weights = InventedWeights(_config_dtype(config), quantization)
        return cls._build(path.parent, config, quantization, (), {}, weights)

    @classmethod
    def _build(
        cls,
        directory: Path,
        config: ModelConfig,
        quantization: Quantization,
        shards: tuple[Shard, ...],
        tensors: Mapping[str, TensorInfo],
        weights: Weights,
    ) -> Checkpoint:
        return cls(
            directory=directory,
            config=config,
            quantization=quantization,
            shards=shards,
            tensors=tensors,
            weights=weights,
            dummy=not shards,
        )

    def resolve(
        self, name: str, shape: tuple[int, ...], *, linear: bool, view: View | None = None
    ) -> WeightSource:
        """Where the parameter `name` of logical `shape` lies, and in which format.

        `linear` says that it is the weight [out, in] of a linear layer which quantisation may
        touch: norms, embeddings, biases and routers are not. Raises `TensorError` if it is missing,
        mis-shaped or mis-typed, or if its format, its scales and the config contradict each other.
        With a `view` it is a part of the tensor of that name.
        """
        return self.weights.find(name, shape, linear, view)

    def resolve_experts(
        self, pattern: str, count: int, shape: tuple[int, ...], view: View | None = None
    ) -> list[WeightSource]:
        """One linear weight of each of `count` experts; `{e}` in `pattern` is the expert, unless
        the `view` is one of a stack.
        """
        if view is not None and view.stacked and view.shape[0] != count:
            raise TensorError(f"{pattern}: {view.shape[0]} experts are stacked, not {count}")
        names = [pattern.replace("{e}", str(expert)) for expert in range(count)]
        self.require_present(names)
        find = self.weights.find
        return [find(name, shape, True, view, expert) for expert, name in enumerate(names)]

    def require_present(self, names: Iterable[str]) -> None:
        """Raise one `TensorError` that counts those of `names` no tensor stands for."""
        missing = self.weights.missing(names)
        if missing:
            what = "tensor is" if len(missing) == 1 else "tensors are"
            raise TensorError(
                f"{self.directory}: {len(missing)} {what} missing: {first_few(missing)}"
            )

    def check_unused(self, used: Iterable[str], tolerated: Iterable[str] = ()) -> None:
        """Raise `TensorError` if a tensor is neither in `used` nor fits a pattern of `tolerated`.

        `used` are names of tensors (`WeightSource.tensor_names`); patterns are those of a shell
        ("model.layers.61.*"). A tensor nobody reads means that the model is not what it seems.
        """
        extra = sorted(self.tensors.keys() - set(used))
        patterns = [fnmatch.translate(pattern) for pattern in tolerated]
        if patterns:
            known = re.compile("|".join(patterns)).match
            extra = [name for name in extra if known(name) is None]
        if extra:
            what = "tensor belongs" if len(extra) == 1 else "tensors belong"
            raise TensorError(
                f"{self.directory}: {len(extra)} {what} to no part of the model: {first_few(extra)}"
            )


def _local_directory(argument: str) -> Path:
    path = Path(argument)
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except OSError as problem:
        raise UsageError(f"{quote(argument)}: cannot be looked up: {problem.strerror}") from None
    if exists:
        raise UsageError(f"{argument}: a file; pass the model directory that holds config.json")
    if _HUB_ID.fullmatch(argument):
        raise UsageError(
            f"{argument}: no such directory; if it is a Hugging Face hub id, download the model and"
            " pass a local directory"
        )
    raise UsageError(f"{quote(argument)}: no such directory")


def _config_dtype(config: ModelConfig) -> str:
    key = "dtype" if "dtype" in config else "torch_dtype"
    name = config.get_str(key, "bfloat16").removeprefix("torch.")
    if name not in _TORCH_DTYPES:
        raise UnsupportedError(
            f"{config.path}: {key} is {quote(name)}; hmc reads {', '.join(_TORCH_DTYPES)}"
        )
    return _TORCH_DTYPES[name]


def _read_shards(directory: Path) -> tuple[tuple[Shard, ...], dict[str, TensorInfo]]:
    """All headers of a checkpoint, found as transformers does: one file, else the index, else
    whatever shards there are."""
    single, index = directory / SINGLE_NAME, directory / INDEX_NAME
    weight_map: dict[str, str] | None = None
    if single.exists():
        names = [SINGLE_NAME]
    elif index.exists():
        weight_map = _read_index(index)
        names = sorted(set(weight_map.values()))
        _require_files(directory, names, f"named by {INDEX_NAME}")
    else:
        names = _list_shards(directory)
    shards = tuple(read_header(directory / name, number) for number, name in enumerate(names))
    tensors = _merge(directory, shards)
    if weight_map is not None:
        _compare(index, weight_map, shards, tensors)
    return shards, tensors


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_object(path, ConfigError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{path}: weight_map is missing, empty or not an object")
    for name in weight_map.values():
        if type(name) is not str:
            raise ConfigError(f"{path}: weight_map names shard {quote(name)}, not a string")
    for name in set(weight_map.values()):
        if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
            raise ConfigError(
                f"{path}: weight_map names shard {quote(name)}, not a .safetensors file here"
            )
    return weight_map


def _list_shards(directory: Path) -> list[str]:
    try:
        files = sorted(entry.name for entry in directory.iterdir())
    except OSError as problem:
        raise CheckpointError(f"{directory}: cannot be listed: {problem.strerror}") from None
    names = [name for name in files if name.endswith(".safetensors")]
    if not names:
        others = [name for name in files if name.endswith((".bin", ".gguf", ".pt", ".pth"))]
        hint = f" ({first_few(others, 1)} is of a format hmc does not read)" if others else ""
        raise ShardError(f"{directory}: no .safetensors shard in it{hint}")
    expected: dict[str, None] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            stem, digits, of, total, end = match.groups()
            if int(total) <= 100_000:
                width = len(digits)
                for number in range(1, int(total) + 1):
                    expected[f"{stem}{number:0{width}d}{of}{total}{end}"] = None
    _require_files(directory, list(expected), "implied by the others' names")
    return names


def _require_files(directory: Path, names: list[str], reason: str) -> None:
    missing = [name for name in names if not (directory / name).exists()]
    if missing:
        raise ShardError(
            f"{directory}: {len(missing)} of {len(names)} shards {reason} missing:"
            f" {first_few(missing)}"
        )


def _merge(directory: Path, shards: tuple[Shard, ...]) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        twice = tensors.keys() & shard.tensors.keys()
        if twice:
            name, what = min(twice), "tensor stands" if len(twice) == 1 else "tensors stand"
            raise TensorError(
                f"{directory}: {len(twice)} {what} in two shards: {quote(name)} in"
                f" {shards[tensors[name].shard].name} and {shard.name}"
            )
        tensors.update(shard.tensors)
    return tensors


def _compare(
    index: Path,
    weight_map: dict[str, str],
    shards: tuple[Shard, ...],
    tensors: dict[str, TensorInfo],
) -> None:
    """Name each way in which the index and the headers disagree, in one line."""
    absent, elsewhere = [], []
    for name, shard in weight_map.items():
        tensor = tensors.get(name)
        if tensor is None:
            absent.append(f"{name} ({shard})")
        elif shards[tensor.shard].name != shard:
            elsewhere.append(f"{name} ({shards[tensor.shard].name}, not {shard})")
    unlisted = [
        f"{name} ({shards[tensors[name].shard].name})"
        for name in sorted(tensors.keys() - weight_map.keys())
    ]
    problems = [
        f"{len(found)} {what}: {first_few(found)}"
        for found, what in (
            (absent, "listed but in no shard"),
            (elsewhere, "listed for the wrong shard"),
            (unlisted, "in a shard but not listed"),
        )
        if found
    ]
    if problems:
        raise TensorError(f"{index}: index and shards disagree: {'; '.join(problems)}")
