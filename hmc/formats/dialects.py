"""How the dialects of `quantization_config` speak of formats: what a row's `find` is made of.

A function a dialect, each with the numbers by which a row is meant in it. It answers with a
`Storage`, or None where the configuration means another format. Which modules a configuration
speaks of is read elsewhere (hmc/checkpoint/quantization.py).

compressed_tensors   https://github.com/vllm-project/compressed-tensors: `weights` of a config group
fine_grained         `fp8` of transformers (DeepSeek, Qwen, GLM, MiniMax), and its `mxfp8`
blocked              both, of blocks of any width
by_method            methods with no choice: `fbgemm_fp8`, `mxfp4` (gpt-oss)
modelopt             NVIDIA's Model Optimizer, by `quant_algo`
awq, gptq            AutoAWQ's version "gemm"; AutoGPTQ and GPTQModel
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from hmc.formats.base import Described, Storage

if TYPE_CHECKING:
    from hmc.checkpoint.config import ModelConfig

Find = Callable[[Described], Storage | None]

GROUP_SIZES = (32, 64, 128)
"""Columns that share one scale in checkpoints of whole numbers that are read, where it is not all
of a row (-1)."""

COMPRESSED = "compressed-tensors"
NUMBERS = {
    COMPRESSED: ("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure",
                 "actorder"),
    "fp8": ("fmt", "weight_block_size", "expert_dtype", "modules_to_convert"),
    "modelopt": ("quant_algo", "group_size"),
    "awq": ("bits", "group_size", "version"),
    "gptq": ("bits", "group_size", "desc_act", "checkpoint_format"),
    "fbgemm_fp8": (),
    "mxfp4": (),
}  # fmt: skip
"""Keys that decide what format is meant, by dialect."""

_IN_ORDER = (None, False, "static", "weight")
"""`actorder` of those whose columns stay in order: it only changed how scales were found."""
_SHAPE = (("_shape", ("I64", "I32"), (2,)),)


def any_of(*finds: Find) -> Find:
    """What the first that knows a configuration says."""

    def find(described: Described) -> Storage | None:
        return next((storage for each in finds if (storage := each(described))), None)

    return find


def compressed_tensors(
    form: str, suffixes: tuple[str, ...], formats: tuple[str, ...], kind: tuple[str, int], *,
    strategies: tuple[str, ...] = (), block: tuple[int, ...] = (), group: int = 0,
    symmetric: bool = True,
) -> Find:  # fmt: skip
    """Weights of a `kind` (type, bits) in one of the `formats` (one that is not said: by the rest),
    scaled by one of the `strategies`: blocks of `block`, groups of `group`, -1: of any size that is
    read, or all of a row.
    """

    def find(described: Described) -> Storage | None:
        weights = described.weights
        if described.method != COMPRESSED or described.packing not in ("", *formats):
            return None
        if (weights.get_str("type", "int").lower(), weights.get_int("num_bits", 8)) != kind:
            return None
        size = weights.get_int("group_size", 0, minimum=-1)
        if weights.get_bool("symmetric", True) is not symmetric or (
            strategy_of(weights) not in strategies
            or weights.values.get("actorder") not in _IN_ORDER
            or (block and weights.get_ints("block_structure") != block)
            or (group > 0 and size != group)
        ):
            return None
        if group >= 0:
            return Storage(form, suffixes)
        beside = _SHAPE if "pack-quantized" in formats else ()
        if strategy_of(weights) == "channel":
            return Storage(form, suffixes, -1, beside)
        return Storage(form, suffixes, size, beside) if size in GROUP_SIZES else None

    return find


def strategy_of(weights: ModelConfig) -> str:
    """`strategy` of compressed-tensors, or what it takes where none is said."""
    size = weights.get_int("group_size", 0, minimum=-1)
    implied = "group" if size > 0 else "channel" if size < 0 else "tensor"
    return weights.get_str("strategy", implied).lower()


def fine_grained(
    form: str, suffixes: tuple[str, ...], block: tuple[int, ...] = (), experts: str = "fp8"
) -> Find:
    """`weight_block_size`, or none: then scales are of a tensor, or of a row. `Described.packing`
    is the `expert_dtype` of routed experts.
    """

    def find(described: Described) -> Storage | None:
        section = described.whole
        if described.method != "fp8" or section.get_str("fmt", "e4m3") not in _E4M3:
            return None
        if section.get_strs("modules_to_convert") or (described.packing or "fp8") != experts:
            return None
        if experts == "fp8" and section.get_ints("weight_block_size") != block:
            return None
        return Storage(form, suffixes)

    return find


_E4M3 = ("e4m3", "float8_e4m3fn", "e4m3fn")


def blocked(
    form: str, rows: int, formats: tuple[str, ...], others: tuple[tuple[int, ...], ...] = ()
) -> Find:
    """FP8 with scales for blocks of `rows` and of as many columns as the configuration says, a
    multiple of 16; but for the `others`, which have formats of their own.
    """

    def find(described: Described) -> Storage | None:
        by_group = described.method == COMPRESSED and strategy_of(described.weights) == "group"
        if described.method == "fp8":
            size = described.whole.get_ints("weight_block_size")
            known = fine_grained(form, ("", "_scale_inv"), size)
        else:
            size = described.weights.get_ints("block_structure")
            if by_group:
                size = (1, described.weights.get_int("group_size", 0, minimum=-1))
            known = compressed_tensors(
                form, ("", "_scale"), formats, ("float", 8), block=() if by_group else size,
                strategies=("group" if by_group else "block",),
            )  # fmt: skip
        if len(size) != 2 or size[0] != rows or size in others or size[1] < 1 or size[1] % 16:
            return None
        found = known(described)
        return None if found is None else replace(found, group=size[1])

    return find


def by_method(form: str, suffixes: tuple[str, ...], method: str) -> Find:
    """A method that has one format alone."""
    return lambda described: Storage(form, suffixes) if described.method == method else None


def modelopt(
    form: str, suffixes: tuple[str, ...], algorithms: tuple[str, ...], group: int = 0
) -> Find:
    """One of the `algorithms`, in groups of `group` where the configuration gives their size."""

    def find(described: Described) -> Storage | None:
        if described.method != "modelopt" or described.packing not in algorithms:
            return None
        size = described.weights.get_int("group_size", 0, minimum=-1) if group else 0
        return Storage(form, suffixes) if size in (0, group) else None

    return find


def awq(form: str, suffixes: tuple[str, ...], bits: int) -> Find:
    """AutoAWQ, version "gemm"."""

    def find(described: Described) -> Storage | None:
        section = described.whole
        if described.method != "awq" or section.get_str("version", "gemm").lower() != "gemm":
            return None
        return _sized(form, suffixes, section, bits)

    return find


def gptq(
    form: str, suffixes: tuple[str, ...], bits: int, version: str = "gptq", *, ordered: bool
) -> Find:
    """AutoGPTQ (`version` is `checkpoint_format`); `ordered`: columns have a group each
    (`desc_act`).
    """

    def find(described: Described) -> Storage | None:
        section = described.weights
        if described.method != "gptq":
            return None
        if section.get_str("checkpoint_format", "gptq") != version:
            return None
        if section.get_bool("desc_act", False) is not ordered:
            return None
        return _sized(form, suffixes, section, bits)

    return find


def _sized(form: str, suffixes: tuple[str, ...], section: ModelConfig, bits: int) -> Storage | None:
    if section.get_int("bits", 4) != bits:
        return None
    size = section.get_int("group_size", 128, minimum=-1)
    return Storage(form, suffixes, size) if size in (-1, *GROUP_SIZES) else None
