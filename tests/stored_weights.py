"""Weights as checkpoints store them, written and read back by others: compressed-tensors where it
knows the format, else explicit packing in torch; nothing here is hmc's.

`STORED` has a `Storing` a way; `store` makes a checkpoint of a plain one in ways by module, and the
twin of what was stored, dequantised, for an oracle.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

Planes = dict[str, Tensor]
LINEAR = re.compile(r"(proj|proj_with_mqa|in_proj_(qkvz?|z)|\.w[123])\.weight$")
KEPT = ["lm_head", "re:.*mlp\\.gate$", "re:.*block_sparse_moe\\.gate$"]


@dataclass(frozen=True)
class Storing:
    """A format, by the `form` that hmc should find: `pack` makes tensors by what follows the
    module's name, `unpack` the f32 weight of them; `section` is what config.json says, `whole`
    the columns that rows must be multiples of. `weights` and `packing` are those of a config group.
    """

    form: str
    pack: Callable[[Tensor], Planes]
    unpack: Callable[[Planes], Tensor]
    section: Mapping[str, Any]
    whole: int = 1
    group: Mapping[str, Any] = field(default_factory=dict)


# compressed-tensors


def _compressed(form: str, packing: str, **numbers: Any) -> Storing:
    args = QuantizationArgs(**numbers)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=packing)
    compressor = BaseCompressor.get_value_from_registry(packing)

    def pack(weight: Tensor) -> Planes:
        stored = compressor.compress({"weight": weight, **_scales(weight, args)}, scheme)
        return {f".{end}": tensor.contiguous() for end, tensor in stored.items()}

    def unpack(planes: Planes) -> Tensor:
        stored = {end[1:]: tensor for end, tensor in planes.items()}
        # It answers in the dtype of scales, rounded.
        if stored["weight_scale"].dtype in (torch.bfloat16, torch.float16):
            stored["weight_scale"] = stored["weight_scale"].float()
        found: Tensor = compressor.decompress(stored, scheme)["weight"].float()
        return found

    weights = json.loads(args.model_dump_json())
    group = {"targets": ["Linear"], "weights": weights, "format": packing}
    section = {"quant_method": "compressed-tensors", "format": packing, "ignore": KEPT,
               "config_groups": {"group_0": group}}  # fmt: skip
    by_group = args.strategy in ("group", "tensor_group")
    whole = args.group_size if by_group and args.group_size else 1
    return Storing(form, pack, unpack, section, whole, group)


def _scales(weight: Tensor, args: QuantizationArgs) -> Planes:
    """Scales of a weight as its numbers ask for, of the largest magnitudes."""
    rows, columns = weight.shape
    down, across = args.block_structure or (1, args.group_size or columns)
    across = columns if across < 0 else across
    if args.strategy == "tensor":
        down, across = rows, columns
    padded = torch.nn.functional.pad(weight, (0, -columns % across, 0, -rows % down))
    blocks = padded.reshape(len(padded) // down, down, -1, across)
    most = (2 ** (args.num_bits - 1) - 1 if args.type == "int" else
            448 if args.num_bits == 8 else 6)  # fmt: skip
    scale = blocks.abs().amax((1, 3)) / most
    state: Planes = {}
    if args.scale_dtype == torch.uint8:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    elif args.scale_dtype is not None:
        state["weight_global_scale"] = whole = 448 / scale.max().reshape(1)
        scale = (scale * whole).to(args.scale_dtype).float()
    if not args.symmetric:
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        scale = (high - low) / (2**args.num_bits - 1)
        zero = (-low / scale).round() - 2 ** (args.num_bits - 1)
        state["weight_zero_point"] = zero.clamp(-128, 127).to(torch.int8)
    if args.type == "int":
        scale = scale.to(torch.bfloat16)
    return {"weight_scale": scale.reshape(1) if args.strategy == "tensor" else scale, **state}


# Explicit packing


def _packed(codes: Tensor, bits: int) -> Tensor:
    """int32 words of codes along the last dimension, the first in the lowest bits."""
    each = 32 // bits
    parts = codes.to(torch.int64).reshape(*codes.shape[:-1], -1, each)
    words = (parts << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    codes = words.to(torch.int64)[..., None] >> torch.arange(0, 32, bits)
    return (codes & 2**bits - 1).flatten(-2)


AWQ_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


def _grouped(weight: Tensor, bits: int, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [K, N], f16 scales [G, N] and zeros [G, N] of a weight [N, K], columns of a group by
    `index`.
    """
    columns = weight.T
    found = []
    for each in range(int(index.max()) + 1):
        part = columns[index == each]
        low, high = part.amin(0).clamp(max=0), part.amax(0).clamp(min=0)
        scale = ((high - low) / (2**bits - 1)).to(torch.float16)
        found.append((scale, (-low / scale.float()).round().clamp(1, 2**bits - 1)))
    scales, zeros = (torch.stack(each) for each in zip(*found, strict=True))
    codes = (columns / scales.float()[index] + zeros[index]).round().clamp(0, 2**bits - 1)
    return codes, scales, zeros


def _worth(codes: Tensor, scales: Tensor, zeros: Tensor, index: Tensor) -> Tensor:
    return ((codes - zeros[index]).float() * scales.float()[index]).T.contiguous()


def _awq_pack(size: int, weight: Tensor) -> Planes:
    index = torch.arange(weight.shape[1]) // size
    codes, scales, zeros = _grouped(weight, 4, index)

    def ordered(codes: Tensor) -> Tensor:
        return codes.reshape(len(codes), -1, 8)[..., AWQ_ORDER].flatten(1)

    return {".qweight": _packed(ordered(codes), 4), ".scales": scales,
            ".qzeros": _packed(ordered(zeros), 4)}  # fmt: skip


def _awq_unpack(size: int, planes: Planes) -> Tensor:
    def plain(words: Tensor) -> Tensor:
        codes = torch.empty(len(words), words.shape[1], 8, dtype=torch.int64)
        codes[..., AWQ_ORDER] = _unpacked(words, 4).reshape(codes.shape)
        return codes.flatten(1)

    codes, zeros = plain(planes[".qweight"]), plain(planes[".qzeros"])
    return _worth(codes, planes[".scales"], zeros, torch.arange(len(codes)) // size)


def _gptq(form: str, bits: int, size: int, version: str = "gptq", order: bool = False) -> Storing:
    less = 1 if version == "gptq" else 0

    def pack(weight: Tensor) -> Planes:
        index = torch.arange(weight.shape[1]) // (weight.shape[1] if size < 0 else size)
        if order:
            generator = torch.Generator().manual_seed(weight.shape[0])
            index = index[torch.randperm(len(index), generator=generator)]
        codes, scales, zeros = _grouped(weight, bits, index)
        return {".qweight": _packed(codes.T, bits).T.contiguous(), ".scales": scales,
                ".qzeros": _packed(zeros - less, bits), ".g_idx": index.int()}  # fmt: skip

    def unpack(planes: Planes) -> Tensor:
        codes = _unpacked(planes[".qweight"].T, bits).T
        zeros = _unpacked(planes[".qzeros"], bits) + less
        return _worth(codes, planes[".scales"], zeros, planes[".g_idx"].long())

    section = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": order,
               "sym": False, "checkpoint_format": version,
               "dynamic": {"-:.*mlp\\.gate$": {}, "-:.*block_sparse_moe\\.gate$": {}}}  # fmt: skip
    return Storing(form, pack, unpack, section, size if size > 0 else 8)


_FP8 = torch.float8_e4m3fn
_BARE = ["lm_head", "mlp.gate", "block_sparse_moe.gate"]


def _fp8(form: str, rows: int, columns: int, end: str, dtype: torch.dtype,
         section: Mapping[str, Any]) -> Storing:  # fmt: skip
    """E4M3 codes, scales for rows x columns (0: all)."""

    def sizes(weight: Tensor) -> tuple[int, int]:
        return rows or weight.shape[0], columns or weight.shape[1]

    def wide(scale: Tensor, codes: Tensor) -> Tensor:
        down, across = sizes(codes)
        if dtype == torch.uint8:
            scale = torch.exp2(scale.float() - 127)
        grid = scale.float().reshape(-(-codes.shape[0] // down), -1)
        spread = grid.repeat_interleave(down, 0).repeat_interleave(across, 1)
        return spread[: codes.shape[0], : codes.shape[1]]

    def pack(weight: Tensor) -> Planes:
        down, across = sizes(weight)
        tall, broad = (-n % size for n, size in zip(weight.shape, (down, across), strict=True))
        blocks = torch.nn.functional.pad(weight.abs(), (0, broad, 0, tall))
        scale = blocks.reshape(len(blocks) // down, down, -1, across).amax((1, 3)) / 448
        exponents = torch.ceil(torch.log2(scale))
        if dtype == torch.uint8:
            scale = (exponents + 127).to(torch.uint8)
        elif dtype == torch.float8_e8m0fnu:
            scale = torch.exp2(exponents).to(dtype)
        else:
            scale = scale.to(dtype)
        codes = (weight / wide(scale, weight)).clamp(-448, 448).to(_FP8)
        return {".weight": codes, end: scale if rows or columns else scale.reshape(())}

    def unpack(planes: Planes) -> Tensor:
        return planes[".weight"].float() * wide(planes[end], planes[".weight"])

    return Storing(form, pack, unpack, section)


def _fine(size: list[int] | None, **more: Any) -> dict[str, Any]:
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
            "weight_block_size": size, "modules_to_not_convert": _BARE, **more}  # fmt: skip


_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def _fp4(form: str, size: int, ends: tuple[str, ...], codes_in: torch.dtype,
         section: Mapping[str, Any]) -> Storing:  # fmt: skip
    """Two E2M1 codes a byte, the first in the low half; an E8M0 scale for `size`, or an E4M3 one
    and a number for all.
    """

    def scales(planes: Planes) -> Tensor:
        found = planes[ends[1]].float()
        return found * planes[ends[2]] if len(ends) > 2 else found

    def pack(weight: Tensor) -> Planes:
        parts = weight.reshape(len(weight), -1, size)
        scale = parts.abs().amax(-1) / 6
        beside: Planes = {}
        if len(ends) > 2:
            beside = {ends[2]: scale.max() / 448}
            beside[ends[1]] = (scale / beside[ends[2]]).to(_FP8)
        else:
            beside[ends[1]] = torch.exp2(torch.ceil(torch.log2(scale))).to(torch.float8_e8m0fnu)
        whole = parts / scales(beside)[..., None]
        codes = (whole[..., None] - _E2M1).abs().argmin(-1).reshape(len(weight), -1, 2)
        both = (codes[..., 0] | codes[..., 1] << 4).to(torch.uint8)
        return {ends[0]: both.view(codes_in), **beside}

    def unpack(planes: Planes) -> Tensor:
        both = planes[ends[0]].view(torch.uint8).long()
        codes = torch.stack((both & 15, both >> 4), -1).flatten(1)
        return _E2M1[codes] * scales(planes).repeat_interleave(size, 1)

    return Storing(form, pack, unpack, section, size)


_EXPONENTS = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, "type": "float"}
_OPTIMIZER = {"quant_method": "modelopt", "ignore": ["lm_head", "*.gate"]}


def _awq(size: int) -> Storing:
    section = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm",
               "zero_point": True, "modules_to_not_convert": _BARE}  # fmt: skip
    return Storing("awq", partial(_awq_pack, size), partial(_awq_unpack, size), section, size)


def _whole(form: str, bits: int, packing: str = "pack-quantized", **numbers: Any) -> Storing:
    return _compressed(form, packing, num_bits=bits, type="int", **numbers)


def _float(form: str, packing: str = "float-quantized", **numbers: Any) -> Storing:
    return _compressed(form, packing, **{"num_bits": 8, "type": "float", **numbers})


def _by(size: int) -> dict[str, Any]:
    return {"strategy": "group", "group_size": size}


_BLOCK = {"strategy": "block"}

STORED: dict[str, Storing] = {
    "fp8": _fp8("fp8", 128, 128, ".weight_scale_inv", torch.float32, _fine([128, 128])),
    "fp8 bf16 scales": _fp8("fp8", 128, 128, ".weight_scale_inv", torch.bfloat16,
                            _fine([128, 128])),
    "fp8 of V4": _fp8("fp8", 128, 128, ".scale", torch.float8_e8m0fnu,
                      _fine([128, 128], scale_fmt="ue8m0")),
    "fp8 of compressed-tensors": _float("fp8", **_BLOCK, block_structure=[128, 128]),
    "fp8-32": _fp8("fp8-32", 32, 32, ".scale", torch.float8_e8m0fnu, _fine([32, 32])),
    "fp8-tensor": _fp8("fp8-tensor", 0, 0, ".weight_scale_inv", torch.bfloat16, _fine(None)),
    "fp8-tensor of Model Optimizer": _fp8("fp8-tensor", 0, 0, ".weight_scale", torch.float32,
                                          {**_OPTIMIZER, "quant_algo": "FP8"}),
    "fp8-tensor of compressed-tensors": _float("fp8-tensor", strategy="tensor"),
    "fp8-channel": _float("fp8-channel", strategy="channel"),
    "fp8-channel of FBGEMM": _fp8(
        "fp8-channel", 1, 0, ".weight_scale", torch.float32,
        {"quant_method": "fbgemm_fp8", "modules_to_not_convert": _BARE}),
    "mxfp8": _float("mxfp8", "mxfp8-quantized", **_EXPONENTS),
    "mxfp8 of MiniMax": _fp8("mxfp8", 1, 32, ".weight_scale_inv", torch.uint8, _fine([1, 32])),
    "fp8-group": _float("fp8-group", **_by(64)),
    "fp8-group of transformers": _fp8("fp8-group", 1, 128, ".weight_scale_inv", torch.float32,
                                      _fine([1, 128])),
    **{
        f"fp8-rows{rows}": _fp8(f"fp8-rows{rows}", rows, columns, ".weight_scale_inv",
                                torch.float32, _fine([rows, columns]))
        for rows, columns in ((2, 128), (4, 64), (8, 16), (16, 16), (32, 128), (64, 64),
                              (128, 32), (256, 48))
    },
    "mxfp4": _float("mxfp4", "mxfp4-pack-quantized", **_EXPONENTS, num_bits=4),
    "mxfp4-i8": _fp4("mxfp4-i8", 32, (".weight", ".scale"), torch.int8,
                     _fine([128, 128], expert_dtype="fp4")),
    "nvfp4": _float("nvfp4", "nvfp4-pack-quantized", num_bits=4, strategy="tensor_group",
                    group_size=16, scale_dtype=torch.float8_e4m3fn),
    "nvfp4-times": _fp4("nvfp4-times", 16, (".weight", ".weight_scale", ".weight_scale_2"),
                        torch.uint8, {**_OPTIMIZER, "quant_algo": "NVFP4"}),
    "int4": _whole("int4", 4, **_by(32)),
    "int4 by 64": _whole("int4", 4, **_by(64)),
    "int4 by channel": _whole("int4", 4, strategy="channel"),
    "int4-zero": _whole("int4-zero", 4, **_by(32), symmetric=False),
    "int8": _whole("int8", 8, "int-quantized", strategy="channel"),
    "int8-packed": _whole("int8-packed", 8, **_by(64)),
    "int8-group": _whole("int8-group", 8, "int-quantized", **_by(32)),
    "int8-zero": _whole("int8-zero", 8, "int-quantized", **_by(32), symmetric=False),
    "int8-zero by channel": _whole("int8-zero", 8, "int-quantized", strategy="channel",
                                   symmetric=False),
    "int8-packed-zero": _whole("int8-packed-zero", 8, **_by(32), symmetric=False),
    "awq": _awq(32),
    "gptq": _gptq("gptq", 4, 32),
    "gptq2": _gptq("gptq2", 4, 64, "gptq_v2"),
    "gptq-order": _gptq("gptq-order", 4, 32, order=True),
    "gptq2-order": _gptq("gptq2-order", 4, 32, "gptq_v2", order=True),
    "gptq by channel": _gptq("gptq", 4, -1),
    "gptq8": _gptq("gptq8", 8, 32),
    "gptq8-order": _gptq("gptq8-order", 8, 32, order=True),
    "gptq2-8": _gptq("gptq2-8", 8, 32, "gptq_v2"),
    "gptq2-8-order": _gptq("gptq2-8-order", 8, 32, "gptq_v2", order=True),
}  # fmt: skip
"""Ways to store weights by a name of each."""


def store(
    directory: Path, plain: Path, way: Callable[[str], Storing | None], section: Mapping[str, Any]
) -> Path:
    """The checkpoint `plain` with every linear weight as `way` of its module says, at `directory`;
    beside it, in the folder "twin", the same dequantised, in F32.
    """
    stored: Planes = {}
    twin: Planes = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        module = name.removesuffix(".weight")
        storing = way(module) if LINEAR.search(name) else None
        if storing is None:
            stored[name], twin[name] = tensor, tensor.float()
            continue
        planes = storing.pack(tensor.float())
        stored |= {module + end: plane for end, plane in planes.items()}
        twin[name] = storing.unpack(planes).contiguous()
        assert (twin[name] - tensor.float()).norm() < 0.25 * tensor.float().norm()
    settings = json.loads((plain / "config.json").read_text())
    for folder, tensors in ((directory, stored), (directory / "twin", twin)):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(settings))
        settings = {**settings, "dtype": "float32"}
    said = {**json.loads((directory / "config.json").read_text()), "quantization_config": section}
    (directory / "config.json").write_text(json.dumps(said, default=str))
    return directory
