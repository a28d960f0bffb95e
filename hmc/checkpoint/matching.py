"""How dialects of `quantization_config` name modules: each function makes one rule of it.

A module is named as in the checkpoint ("model.layers.3.mlp.gate"). Each rule refuses, as a
`ConfigError`, patterns that are no regular expressions.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.jsonfile import quote
from hmc.errors import ConfigError

T = TypeVar("T")
Matcher = Callable[[str], bool]

_CLASSES = ("Linear", "LinearBase")
"""Classes of modules that every quantised weight is of."""


def nothing(module: str) -> bool:
    """No module is meant."""
    return False


def listed(section: ModelConfig, key: str, patterns: tuple[str, ...]) -> Matcher:
    """The rule of transformers' `should_convert_module` for `modules_to_not_convert`.

    A pattern is a regex that matches from the start of a module's name to a boundary of it
    ("layers.1" is not "layers.11"), or a plain suffix of the name ("gate").
    """
    joined = either(section, key, patterns)
    matches = re.compile(rf"(?:{joined})(?:(?<=\.)|(?=\.|$))").match
    return lambda module: module.endswith(patterns) or matches(module) is not None


def targeted(section: ModelConfig, key: str, named: Mapping[str, T]) -> Callable[[str], T | None]:
    """The rule of compressed-tensors for `targets` and `ignore`: what the first pattern that fits a
    module stands for. Whole names come first, then "re:" and a regex matched from the start, in
    alphabetical order, then ends of names, then classes.
    """
    regexes = sorted(pattern for pattern in named if pattern.startswith("re:"))
    either(section, key, [pattern[3:] for pattern in regexes])
    compiled = [(re.compile(pattern[3:]).match, named[pattern]) for pattern in regexes]
    ends = [(f".{name}", value) for name, value in named.items() if not name.startswith("re:")]
    any_linear = next((named[name] for name in _CLASSES if name in named), None)

    def find(module: str) -> T | None:
        if module in named:
            return named[module]
        for matches, value in compiled:
            if matches(module):
                return value
        for end, value in ends:
            if module.endswith(end):
                return value
        return any_linear

    return find


def wild(patterns: Iterable[str]) -> Matcher:
    """The rule of NVIDIA's Model Optimizer: names in which "*" stands for anything; a module is
    meant by its own name, its end, and that of a module around it.
    """
    forms = ("{}", "{}.*", "*.{}", "*.{}.*")
    regexes = [fnmatch.translate(form.format(each)) for each in patterns for form in forms]
    matches = re.compile("|".join(regexes) or "(?!)").match
    return lambda module: matches(module) is not None


def around(named: Mapping[str, T]) -> Callable[[str], T | None]:
    """What the name of a module stands for, or of the innermost module around it that has one."""

    def find(module: str) -> T | None:
        while module:
            if module in named:
                return named[module]
            module = module.rpartition(".")[0]
        return None

    return find


def either(section: ModelConfig, key: str, patterns: Sequence[str]) -> str:
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
