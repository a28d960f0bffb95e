"""Against compressed-tensors itself: which group a module is of, what its stored weights are."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoint_files import write_config
from safetensors.torch import save_file

from hmc.checkpoint import Checkpoint, ModelConfig
from hmc.checkpoint.matching import targeted
from hmc.checkpoint.source import WeightSource
from hmc.formats import format_of, forms
from hmc.formats.arrange import arranged
from hmc.formats.decode import NUMPY, decode, floats

pytest.importorskip("compressed_tensors")  # of the extra "test"
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.utils.match import is_match, match_targets

LAYERS = [f"model.layers.{layer}" for layer in (0, 1, 11)]
ENDS = "self_attn.q_proj self_attn.k_proj mlp.gate mlp.gate_proj mlp.experts.1.up_proj".split()
MODULES = ["lm_head", *(f"{layer}.{end}" for layer in LAYERS for end in ENDS)]
PATTERNS = ["Linear", "re:.*", "re:.*mlp.*", "re:.*experts.*", "re:.*self_attn.*", "re:.*gate$",
            "re:model.layers.1", r"re:.*layers\.(0|11)\..*", "re:lm_head", *MODULES]  # fmt: skip
ROWS, COLUMNS = 72, 192  # of neither dimension a multiple of 128


def test_groups_of_modules() -> None:
    rng, linear = random.Random(1), torch.nn.Linear(1, 1)
    config = ModelConfig(Path("config.json"), {}, "")
    for _ in range(300):
        groups = {each: number for number in range(3) for each in rng.sample(PATTERNS, 2)}
        ignored = dict.fromkeys(rng.sample(PATTERNS[1:], rng.randint(0, 3)), True)
        ours, kept = targeted(config, "targets", groups), targeted(config, "ignore", ignored)
        for module in MODULES:
            theirs = None
            if is_match(module, linear, list(groups), list(ignored)):
                theirs = groups[match_targets(module, linear, groups)[0]]
            assert (None if kept(module) else ours(module)) == theirs, (module, groups, ignored)


WHOLE, FLOAT = {"type": "int"}, {"type": "float"}
EXPONENTS = {"strategy": "group", "group_size": 32, "scale_dtype": torch.uint8, **FLOAT}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("int4", "pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32, **WHOLE}),
    ("int4", "pack-quantized", {"num_bits": 4, "strategy": "channel", **WHOLE}),
    ("int4-zero", "pack-quantized",
     {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False, **WHOLE}),
    ("int8-packed", "pack-quantized",
     {"num_bits": 8, "strategy": "group", "group_size": 64, **WHOLE}),
    ("int8", "int-quantized", {"num_bits": 8, "strategy": "channel", **WHOLE}),
    ("int8-group", "int-quantized",
     {"num_bits": 8, "strategy": "group", "group_size": 32, **WHOLE}),
    ("int8-zero", "int-quantized",
     {"num_bits": 8, "strategy": "group", "group_size": 64, "symmetric": False, **WHOLE}),
    ("int8-zero", "int-quantized",
     {"num_bits": 8, "strategy": "channel", "symmetric": False, **WHOLE}),
    ("int8-packed-zero", "pack-quantized",
     {"num_bits": 8, "strategy": "group", "group_size": 32, "symmetric": False, **WHOLE}),
    ("fp8-group", "float-quantized",
     {"num_bits": 8, "strategy": "group", "group_size": 48, **FLOAT}),
    ("fp8-rows8", "float-quantized",
     {"num_bits": 8, "strategy": "block", "block_structure": [8, 80], **FLOAT}),
    ("fp8-channel", "float-quantized", {"num_bits": 8, "strategy": "channel", **FLOAT}),
    ("fp8-tensor", "float-quantized", {"num_bits": 8, "strategy": "tensor", **FLOAT}),
    ("fp8-32", "float-quantized",
     {"num_bits": 8, "strategy": "block", "block_structure": [32, 32], **FLOAT}),
    ("mxfp8", "mxfp8-quantized", {"num_bits": 8, **EXPONENTS}),
    ("mxfp4", "mxfp4-pack-quantized", {"num_bits": 4, **EXPONENTS}),
    ("nvfp4", "nvfp4-pack-quantized", {"num_bits": 4, "strategy": "tensor_group",
     "group_size": 16, "scale_dtype": torch.float8_e4m3fn, **FLOAT}),
]  # fmt: skip


@pytest.mark.parametrize(("form", "packing", "numbers"), CASES)
def test_stored_weights(tmp_path: Path, form: str, packing: str, numbers: dict[str, Any]) -> None:
    args = QuantizationArgs(**numbers)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=packing)
    compressor = BaseCompressor.get_value_from_registry(packing)
    stored = compressor.compress(_drawn(args), scheme)
    group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
    config = {"quant_method": "compressed-tensors", "format": packing,
              "config_groups": {"group_0": group}}  # fmt: skip
    write_config(tmp_path, quantization_config=config)
    file = tmp_path / "model.safetensors"
    save_file({f"m.{name}": tensor.contiguous() for name, tensor in stored.items()}, file)
    checkpoint = Checkpoint.open(tmp_path)
    source = checkpoint.resolve("m.weight", (ROWS, COLUMNS), linear=True)
    assert source.format == form and checkpoint.check_unused(source.tensor_names) == ()
    theirs = compressor.decompress(stored, scheme)["weight"].float().numpy()  # some in bf16
    assert np.abs(_read(source, file.read_bytes()) - theirs).max() < 4e-3 * np.abs(theirs).max()


def _drawn(args: QuantizationArgs) -> dict[str, torch.Tensor]:
    """A weight with the scales that its numbers ask for, as a calibration leaves them."""
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS)
    down, across = args.block_structure or (1, args.group_size or COLUMNS)
    if args.strategy == "tensor":
        down = ROWS
    padded = torch.nn.functional.pad(weight.abs(), (0, -COLUMNS % across, 0, -ROWS % down))
    blocks = padded.reshape(len(padded) // down, down, -1, across).amax((1, 3))
    scale = blocks / (2 ** (args.num_bits - 1) - 1 if args.type == "int" else
                      448 if args.num_bits == 8 else 6)  # fmt: skip
    state = {"weight": weight}
    if args.scale_dtype == torch.uint8:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    elif args.scale_dtype is not None:
        state["weight_global_scale"] = whole = 448 / scale.max().reshape(1)
        scale = (scale * whole).to(args.scale_dtype).float()
    if args.type == "int":
        scale = scale.to(torch.bfloat16)
    if not args.symmetric:
        state["weight_zero_point"] = torch.randint(-3, 4, scale.shape, dtype=torch.int8)
    return {**state, "weight_scale": scale.reshape(1) if args.strategy == "tensor" else scale}


def _read(source: WeightSource, data: bytes) -> npt.NDArray[np.float32]:
    """The weight by hmc's own meaning of its planes."""
    row, kept, planes = format_of(source.format), [], []
    for form, tensor in zip(
        forms(row, source.shape, source.group, source.dtypes), source.tensors, strict=True
    ):
        means = form.plane.means(form.dtype)
        raw = np.frombuffer(data, np.uint8, tensor.nbytes, tensor.offset).view(NUMPY[means])
        found = arranged(form, raw)
        planes.append(floats(found, means) if form.widened else found)
        kept.append(form.kept)
    return decode(row, planes, kept, source.shape, source.group)
