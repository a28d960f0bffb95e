"""config.json behind typed getters, each of whose errors names the key and the file.

hmc keeps no class per family's configuration: a model file asks for the keys it needs, by their
names in config.json, and a checkpoint that lacks one is refused there and then.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hmc.checkpoint.jsonfile import parse_object, quote, read_bytes
from hmc.errors import ConfigError, UnsupportedError

CONFIG_NAME = "config.json"
LOSSY_KEY = "hmc_lossy"
"""The key by which `hmc quantize` says what a checkpoint of its own has lost."""

_OF_BOTH = ("architectures", "tie_word_embeddings", "eos_token_id", "dtype", "torch_dtype")
"""Keys of a model with several parts that count for its language model too."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The object in `path`, or one nested in it under the dotted `prefix`.

    A key that holds null counts as absent, as it does for Hugging Face. The `require_*` getters
    raise `ConfigError` for an absent key, the `get_*` getters return their default; both raise it
    for a value of another type.
    """

    path: Path
    values: Mapping[str, Any]
    sha256: str
    prefix: str = ""

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def require_int(self, key: str, *, minimum: int = 0) -> int:
        """A whole number of at least `minimum`."""
        self._present(key)
        return self.get_int(key, minimum, minimum=minimum)

    def get_int(self, key: str, default: int, *, minimum: int = 0) -> int:
        """A whole number of at least `minimum`; `default` is returned as it is."""
        value: int = self._get(key, default, lambda found: type(found) is int, "a whole number")
        if key in self and value < minimum:
            raise self._wrong(key, f"at least {minimum}")
        return value

    def require_float(self, key: str) -> float:
        """A finite number."""
        self._present(key)
        return self.get_float(key, 0.0)

    def get_float(self, key: str, default: float) -> float:
        """A finite number, whole or not."""

        def finite(value: Any) -> bool:
            return type(value) in (int, float) and abs(value) <= 1e300

        return float(self._get(key, default, finite, "a finite number"))

    def get_floats(self, key: str) -> tuple[float, ...]:
        """A list of numbers, which may be infinite; () if absent."""

        def right(value: Any) -> bool:
            items = value if type(value) is list else [value]
            return all(type(item) in (int, float) and item == item for item in items)

        found = self._get(key, (), right, "a list of numbers")
        return tuple(map(float, found)) if type(found) in (list, tuple) else (float(found),)

    def get_bool(self, key: str, default: bool) -> bool:
        """True or false."""
        right: bool = self._get(key, default, lambda found: type(found) is bool, "true or false")
        return right

    def require_str(self, key: str) -> str:
        """A string."""
        self._present(key)
        return self.get_str(key, "")

    def get_str(self, key: str, default: str) -> str:
        """A string."""
        return str(self._get(key, default, lambda found: type(found) is str, "a string"))

    def get_ints(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers, or one alone (`eos_token_id` is either); () if absent."""

        def right(value: Any) -> bool:
            items = value if type(value) is list else [value]
            return all(type(item) is int for item in items)

        found = self._get(key, (), right, "a whole number or a list of them")
        return (found,) if type(found) is int else tuple(found)

    def get_strs(self, key: str) -> tuple[str, ...]:
        """A list of strings; () if absent."""

        def right(value: Any) -> bool:
            return type(value) is list and all(type(item) is str for item in value)

        return tuple(self._get(key, (), right, "a list of strings"))

    @property
    def depth(self) -> int:
        """Layers: `num_hidden_layers`, or where that is absent as many as `layers_block_type`
        names.
        """
        if "num_hidden_layers" not in self and (kinds := self.get_strs("layers_block_type")):
            return len(kinds)
        return self.require_int("num_hidden_layers", minimum=1)

    @property
    def text(self) -> ModelConfig:
        """What describes the language model: `text_config` where one is nested, and what the whole
        says for it (`_OF_BOTH`); else all of it.
        """
        inner = self.section("text_config")
        if inner is None:
            return self
        shared = {key: self.values[key] for key in _OF_BOTH if key in self}
        own = {key: value for key, value in inner.values.items() if value is not None}
        return replace(inner, values=shared | own)

    def with_text(self, **changes: Any) -> ModelConfig:
        """The same with keys of its language model changed."""
        if (inner := self.section("text_config")) is not None:
            changes = {"text_config": {**inner.values, **changes}}
        return replace(self, values={**self.values, **changes})

    def section(self, key: str) -> ModelConfig | None:
        """The object nested under `key`, with getters of its own; None if absent."""
        found = self._get(key, None, lambda value: type(value) is dict, "an object")
        if found is None:
            return None
        return ModelConfig(self.path, found, self.sha256, f"{self.prefix}{key}.")

    def error(self, key: str, problem: str) -> ConfigError:
        """A `ConfigError` about `key`, for the caller to raise: "<file>: <key> <problem>"."""
        return ConfigError(f"{self.path}: {self.prefix}{key} {problem}")

    def unsupported(self, key: str, supported: str) -> UnsupportedError:
        """An `UnsupportedError` about the value of `key`, for the caller to raise."""
        value = quote(self.values[key]) if key in self else "missing"
        return UnsupportedError(
            f"{self.path}: {self.prefix}{key} is {value}; hmc reads {supported}"
        )

    def _get(self, key: str, default: Any, right: Callable[[Any], bool], wanted: str) -> Any:
        value = self.values.get(key)
        if value is None:
            return default
        if not right(value):
            raise self._wrong(key, wanted)
        return value

    def _present(self, key: str) -> None:
        if self.values.get(key) is None:
            raise self.error(key, "is null" if key in self.values else "is missing")

    def _wrong(self, key: str, wanted: str) -> ConfigError:
        return self.error(key, f"is {quote(self.values[key])}, must be {wanted}")


def load_config(directory: Path | str) -> ModelConfig:
    """config.json of a model directory, or of its own path.

    Raises `ConfigError` if it is absent, unreadable, not valid JSON or not an object.
    """
    path = Path(directory)
    if path.is_dir():
        path = path / CONFIG_NAME
    data = read_bytes(path, ConfigError)
    values = parse_object(data, str(path), ConfigError)
    return ModelConfig(path, values, hashlib.sha256(data).hexdigest())
