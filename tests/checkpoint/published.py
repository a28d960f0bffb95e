"""Sections of `quantization_config` as checkpoints are published with them, shortened to one name
of each kind, and the formats that modules of theirs have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Section = dict[str, Any]

ATTENTION = "model.layers.7.self_attn.q_proj"
EXPERT = "model.layers.7.mlp.experts.31.up_proj"
ROUTER = "model.layers.7.mlp.gate"
HEAD = "lm_head"


@dataclass(frozen=True)
class Published:
    """A section, and the format of some modules' weights ("": as they are)."""

    section: Section
    formats: dict[str, str]


def group(weights: Section, **more: Any) -> Section:
    """A config group of compressed-tensors."""
    return {"targets": ["Linear"], "weights": weights, "input_activations": None, **more}


def compressed(form: str, ignore: list[str], *groups: Section, **more: Any) -> Section:
    """A section of compressed-tensors."""
    named = {f"group_{number}": each for number, each in enumerate(groups)}
    return {"quant_method": "compressed-tensors", "format": form, "ignore": ignore,
            "config_groups": named, "quantization_status": "compressed", **more}  # fmt: skip


def whole(bits: int, size: int | None, *, symmetric: bool = True) -> Section:
    """`weights` of whole numbers: by group, by channel where there is none."""
    strategy = "channel" if size is None else "group"
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": strategy,
            "group_size": size, "dynamic": False, "observer": "minmax", "actorder": None,
            "block_structure": None, "observer_kwargs": {}}  # fmt: skip


def floats(bits: int, strategy: str, **more: Any) -> Section:
    """`weights` of floats."""
    return {"num_bits": bits, "type": "float", "symmetric": True, "strategy": strategy,
            "dynamic": False, "observer": "minmax", "group_size": None, **more}  # fmt: skip


TOKEN = floats(8, "token", dynamic=True)
NVFP4 = floats(4, "tensor_group", group_size=16, scale_dtype="torch.float8_e4m3fn")

PUBLISHED: dict[str, Published] = {
    "Qwen3-30B-A3B-FP8": Published(
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
         "weight_block_size": [128, 128],
         "modules_to_not_convert": ["lm_head", "model.layers.7.mlp.gate", "model.norm"]},
        {ATTENTION: "fp8", EXPERT: "fp8", ROUTER: "", HEAD: ""},
    ),
    "MiniMax-M3 (MXFP8)": Published(
        {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [1, 32],
         "ignored_layers": ["gate", "lm_head"]},
        {ATTENTION: "mxfp8", EXPERT: "mxfp8", ROUTER: "", HEAD: ""},
    ),
    "MiniMax-M3-MXFP8": Published(
        {"quant_method": "mxfp8", "activation_scheme": "dynamic", "weight_block_size": [1, 32],
         "ignored_layers": ["lm_head", "model.embed_tokens", ROUTER]},
        {ATTENTION: "mxfp8", EXPERT: "mxfp8", ROUTER: "", HEAD: ""},
    ),
    "DeepSeek-V4.1": Published(
        {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "expert_dtype": "fp4",
         "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
        {"layers.3.attn.wq_a": "fp8-32", "layers.3.ffn.experts.9.w1": "mxfp4-i8",
         "layers.3.ffn.shared_experts.w1": "fp8-32"},
    ),
    "Mistral-Small-4 (static, a tensor)": Published(
        {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None,
         "modules_to_not_convert": ["vision_tower", "lm_head", "gate"]},
        {ATTENTION: "fp8-tensor", EXPERT: "fp8-tensor", ROUTER: ""},
    ),
    "Llama FBGEMM": Published(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
         "modules_to_not_convert": ["model.layers.0", "lm_head", "self_attn"]},
        {EXPERT: "fp8-channel", "model.layers.0.mlp.up_proj": "", HEAD: ""},
    ),
    "gpt-oss-20b": Published(
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn",
         "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]},
        {ATTENTION: "", "model.layers.7.mlp.experts.gate_up_proj": "mxfp4",
         "model.layers.7.mlp.router": ""},
    ),
    "GLM-4.5-FP8": Published(
        compressed("float-quantized", ["lm_head", "re:.*mlp.gate$", ROUTER],
                   group(floats(8, "channel"), input_activations=TOKEN)),
        {ATTENTION: "fp8-channel", EXPERT: "fp8-channel", ROUTER: "", HEAD: ""},
    ),
    "FP8 block of llm-compressor": Published(
        compressed("float-quantized", ["re:.*gate$"],
                   group(floats(8, "block", block_structure=[128, 128]))),
        {EXPERT: "fp8", ROUTER: ""},
    ),
    "FP8 static of llm-compressor": Published(
        compressed("float-quantized", ["lm_head"],
                   group(floats(8, "tensor"), input_activations=floats(8, "tensor")),
                   kv_cache_scheme=floats(8, "tensor")),
        {ATTENTION: "fp8-tensor", HEAD: ""},
    ),
    "MXFP8 of llm-compressor": Published(
        compressed("mxfp8-quantized", [],
                   group(floats(8, "group", group_size=32, scale_dtype="torch.uint8"))),
        {EXPERT: "mxfp8"},
    ),
    "MXFP4 of llm-compressor": Published(
        compressed("mxfp4-pack-quantized", ["lm_head"],
                   group(floats(4, "group", group_size=32, scale_dtype="torch.uint8"))),
        {EXPERT: "mxfp4"},
    ),
    "Kimi-K2.5": Published(
        compressed("pack-quantized", ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*",
                   "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"], group(whole(4, 32)),
                   kv_cache_scheme=None),
        {ATTENTION: "", EXPERT: "int4", "model.layers.0.mlp.up_proj": "", HEAD: ""},
    ),
    "W4A16 asymmetric": Published(
        compressed("pack-quantized", [ROUTER], group(whole(4, 128, symmetric=False))),
        {EXPERT: "int4-zero", ROUTER: ""},
    ),
    "W8A8 and W8A16 in one": Published(
        compressed("mixed-precision", ["lm_head", "re:.*mlp\\.gate$"],
                   group(whole(8, None), targets=["re:.*mlp.*"], format="int-quantized",
                         input_activations={**whole(8, None), "strategy": "token"}),
                   group(whole(8, 128), targets=["re:.*self_attn.(q|k|v)_proj$"],
                         format="pack-quantized")),
        {EXPERT: "int8", ATTENTION: "int8-packed", ROUTER: "", HEAD: ""},
    ),
    "GLM-5.3-Flash-NVFP4": Published(
        compressed("mixed-precision", ["re:.*self_attn.*", "lm_head"],
                   group(NVFP4, format="nvfp4-pack-quantized", targets=[
                       "re:.*\\.layers\\.(?:[3-9]|[1-3][0-9])\\.mlp\\.experts\\..*_proj$"]),
                   group(floats(8, "channel"), format="float-quantized",
                         targets=["re:.*\\.layers\\.45\\.mlp\\.experts\\.\\d+\\..*_proj$"])),
        {EXPERT: "nvfp4", "model.layers.45.mlp.experts.0.up_proj": "fp8-channel", ATTENTION: "",
         "model.layers.0.mlp.up_proj": ""},
    ),
    "MiniMax-M2 of Model Optimizer": Published(
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "kv_cache_scheme": {"num_bits": 8},
         "ignore": ["lm_head", "model.layers.*.mlp.gate", "model.layers.*.self_attn*"]},
        {EXPERT: "nvfp4-times", ATTENTION: "", ROUTER: "", HEAD: ""},
    ),
    "FP8 of Model Optimizer": Published(
        {"quant_method": "modelopt", "quant_algo": "FP8", "exclude_modules": ["*mlp.gate"]},
        {EXPERT: "fp8-tensor", ROUTER: ""},
    ),
    "Qwen3.5 of Model Optimizer, mixed": Published(
        {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "quantized_layers": {
            ATTENTION: {"quant_algo": "FP8"},
            "model.layers.7.mlp.experts": {"quant_algo": "NVFP4", "group_size": 16},
            "model.layers.*.mlp.shared_expert.*": {"quant_algo": "W4A16_NVFP4"}}},
        {ATTENTION: "fp8-tensor", EXPERT: "nvfp4-times", ROUTER: "",
         "model.layers.2.mlp.shared_expert.up_proj": "nvfp4-times"},
    ),
    "AWQ": Published(
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm",
         "zero_point": True, "modules_to_not_convert": ["gate"]},
        {ATTENTION: "awq", EXPERT: "awq", ROUTER: ""},
    ),
    "GPTQ": Published(
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True,
         "checkpoint_format": "gptq", "lm_head": False, "pack_dtype": "int32",
         "dynamic": {"-:.*\\.mlp\\.gate$": {}, "+:.*self_attn.*": {"bits": 8}}},
        {EXPERT: "gptq", ATTENTION: "gptq8", ROUTER: "", HEAD: ""},
    ),
    "GPTQ with act-order": Published(
        {"quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": True, "sym": False},
        {EXPERT: "gptq-order", HEAD: ""},
    ),
    "GPTQ v2 of 8 bits": Published(
        {"quant_method": "gptq", "bits": 8, "group_size": 128, "checkpoint_format": "gptq_v2",
         "dynamic": {"+:.*self_attn.*": {"desc_act": True}}},
        {EXPERT: "gptq2-8", ATTENTION: "gptq2-8-order"},
    ),
    "W8A16 asymmetric": Published(
        compressed("pack-quantized", [ROUTER], group(whole(8, 128, symmetric=False))),
        {EXPERT: "int8-packed-zero"},
    ),
    "W8A8 asymmetric and by group": Published(
        compressed("int-quantized", [ROUTER],
                   group(whole(8, None, symmetric=False), targets=["re:.*mlp.*"]),
                   group(whole(8, 64), targets=["re:.*self_attn.*"])),
        {EXPERT: "int8-zero", ATTENTION: "int8-group", ROUTER: ""},
    ),
    "FP8 by group and in other blocks": Published(
        compressed("float-quantized", [ROUTER],
                   group(floats(8, "group", group_size=128), targets=["re:.*mlp.*"]),
                   group(floats(8, "block", block_structure=[64, 256]),
                         targets=["re:.*self_attn.*"])),
        {EXPERT: "fp8-group", ATTENTION: "fp8-rows64", ROUTER: ""},
    ),
    "FP8 of transformers in other blocks": Published(
        {"quant_method": "fp8", "weight_block_size": [16, 48]},
        {EXPERT: "fp8-rows16", HEAD: ""},
    ),
    "GPTQ v2": Published(
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"},
        {EXPERT: "gptq2"},
    ),
}  # fmt: skip

MATRIX = (256, 512)
STORED: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {
    "fp8": {".weight": ("F8_E4M3", MATRIX), ".weight_scale_inv": ("BF16", (2, 4))},
    "fp8-32": {".weight": ("F8_E4M3", MATRIX), ".scale": ("F8_E8M0", (8, 16))},
    "fp8-channel": {".weight": ("F8_E4M3", MATRIX), ".weight_scale": ("F32", (256, 1))},
    "fp8-tensor": {".weight": ("F8_E4M3", MATRIX), ".weight_scale": ("F32", ())},
    "mxfp8": {".weight": ("F8_E4M3", MATRIX), ".weight_scale_inv": ("U8", (256, 16))},
    "mxfp4": {".weight_packed": ("U8", (256, 256)), ".weight_scale": ("U8", (256, 16))},
    "mxfp4-i8": {".weight": ("I8", (256, 256)), ".scale": ("F8_E8M0", (256, 16))},
    "nvfp4": {".weight_packed": ("U8", (256, 256)), ".weight_scale": ("F8_E4M3", (256, 32)),
              ".weight_global_scale": ("F32", (1,))},
    "nvfp4-times": {".weight": ("U8", (256, 256)), ".weight_scale": ("F8_E4M3", (256, 32)),
                    ".weight_scale_2": ("F32", ())},
    "int4": {".weight_packed": ("I32", (256, 64)), ".weight_scale": ("BF16", (256, 16)),
             ".weight_shape": ("I32", (2,))},
    "int4-zero": {".weight_packed": ("I32", (256, 64)), ".weight_scale": ("BF16", (256, 4)),
                  ".weight_zero_point": ("I32", (32, 4)), ".weight_shape": ("I64", (2,))},
    "int8": {".weight": ("I8", MATRIX), ".weight_scale": ("BF16", (256, 1))},
    "int8-packed": {".weight_packed": ("I32", (256, 128)), ".weight_scale": ("BF16", (256, 4)),
                    ".weight_shape": ("I64", (2,))},
    "int8-group": {".weight": ("I8", MATRIX), ".weight_scale": ("BF16", (256, 8))},
    "int8-zero": {".weight": ("I8", MATRIX), ".weight_scale": ("BF16", (256, 1)),
                  ".weight_zero_point": ("I8", (256, 1))},
    "int8-packed-zero": {
        ".weight_packed": ("I32", (256, 128)), ".weight_scale": ("BF16", (256, 4)),
        ".weight_zero_point": ("I32", (64, 4)), ".weight_shape": ("I64", (2,))},
    "fp8-group": {".weight": ("F8_E4M3", MATRIX), ".weight_scale": ("F32", (256, 4))},
    "fp8-rows16": {".weight": ("F8_E4M3", MATRIX), ".weight_scale_inv": ("F32", (16, 11))},
    "fp8-rows64": {".weight": ("F8_E4M3", MATRIX), ".weight_scale": ("F32", (4, 2))},
    "gptq2-8": {".qweight": ("I32", (128, 256)), ".qzeros": ("I32", (4, 64)),
                ".scales": ("F16", (4, 256))},
    "gptq2-8-order": {".qweight": ("I32", (128, 256)), ".qzeros": ("I32", (4, 64)),
                      ".scales": ("F16", (4, 256)), ".g_idx": ("I32", (512,))},
    "awq": {".qweight": ("I32", (512, 32)), ".qzeros": ("I32", (4, 32)),
            ".scales": ("F16", (4, 256))},
    "gptq": {".qweight": ("I32", (64, 256)), ".qzeros": ("I32", (4, 32)),
             ".scales": ("F16", (4, 256))},
    "gptq2": {".qweight": ("I32", (64, 256)), ".qzeros": ("I32", (16, 32)),
              ".scales": ("F16", (16, 256))},
    "gptq8": {".qweight": ("I32", (128, 256)), ".qzeros": ("I32", (4, 64)),
              ".scales": ("F16", (4, 256))},
    "gptq-order": {".qweight": ("I32", (64, 256)), ".qzeros": ("I32", (1, 32)),
                   ".scales": ("F16", (1, 256)), ".g_idx": ("I32", (512,))},
}  # fmt: skip
"""Tensors of a weight [256, 512] in the numbers of `PUBLISHED`, after the name of its module."""
