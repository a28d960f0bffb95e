"""Whole numbers of 4 and 8 bits with a scale for every group of columns of a row, or for a row:
compressed-tensors' packed INT4 (codes -8 to 7, stored plus 8) without and with zero points, its
INT8, AWQ and GPTQ.
"""

from __future__ import annotations

from dataclasses import replace

from hmc.formats import layouts
from hmc.formats.base import GROUP, WHOLE, Described, Format, Plane, Storage
from hmc.formats.fp8 import is_float8
from hmc.formats.layouts import PACKED_ZEROS, TRANSPOSED, Layout

GROUP_SIZES = (32, 128)
"""Columns that share one scale in checkpoints that are read."""


def _find(described: Described) -> Storage | None:
    weights = described.weights
    if described.method != "compressed-tensors" or is_float8(weights):
        return None
    if described.packing != "pack-quantized":
        raise described.whole.unsupported("format", "pack-quantized and float-quantized")
    if weights.get_int("num_bits", 8) != 4:
        raise weights.unsupported("num_bits", "4")
    if weights.get_str("type", "int") != "int":
        raise weights.unsupported("type", "int")
    if not weights.get_bool("symmetric", True):
        raise weights.unsupported("symmetric", "true (no zero points)")
    if weights.get_str("strategy", "tensor") != "group":
        raise weights.unsupported("strategy", "group")
    group = weights.get_int("group_size", 0, minimum=-1)
    if group not in GROUP_SIZES:
        raise weights.unsupported("group_size", " and ".join(map(str, GROUP_SIZES)))
    order = weights.values.get("actorder")
    # "static" ("weight" of old) only changed how scales were found; columns stay in order.
    if order not in (None, False, "static", "weight"):
        raise weights.unsupported("actorder", "null, static and weight")
    beside = (("_shape", ("I64", "I32"), (2,)),)
    return Storage("int4", ("_packed", "_scale"), group, beside)


_WHOLE_FLOATS = ("BF16", "F32", "F16")
_BY_GROUP = Plane("scale", _WHOLE_FLOATS, ("_scale",), columns=GROUP, ragged=False,
                  kept=("BF16", "F32"))  # fmt: skip
_ZERO = Plane("zero", ("I32",), ("_zero_point",), columns=GROUP, ragged=False, kind="zero",
              layout=PACKED_ZEROS)  # fmt: skip
_CODES = Plane("codes", ("I32",), ("_packed",), bits=4)

INT4 = Format(
    name="int4",
    title="INT4",
    planes=(_CODES, _BY_GROUP),
    exact_in=("bf16", "whole", "f32"),
    about="INT4 symmetric, one {scale} scale per {group} columns",
    values=tuple(float(code - 8) for code in range(16)),
    find=_find,
)
INT4_ZERO = Format(
    name="int4-zero",
    title="INT4",
    planes=(_CODES, _BY_GROUP, _ZERO),
    exact_in=("bf16", "whole", "f32"),
    about="INT4 with zero points, one {scale} scale per {group} columns",
    values=tuple(float(code) for code in range(16)),
)
INT8 = Format(
    name="int8",
    title="INT8",
    planes=(
        Plane("codes", ("I8",)),
        Plane("scale", _WHOLE_FLOATS, ("_scale",), columns=WHOLE, kept=("F32",)),
    ),
    exact_in=("bf16", "whole", "f32"),
    about="INT8, a scale a row",
    values=tuple(float(code - 256 * (code > 127)) for code in range(256)),
)
INT8_PACKED = Format(
    name="int8-packed",
    title="INT8",
    planes=(replace(_CODES, bits=8), _BY_GROUP),
    exact_in=("bf16", "whole", "f32"),
    about="INT8 symmetric, one {scale} scale per {group} columns",
    values=tuple(float(code - 128) for code in range(256)),
)


def _apart(name: str, bits: int, codes: Layout, zeros: Layout, ordered: bool = False) -> Format:
    """Weights of AWQ and GPTQ, whose planes lie by inputs in files and by outputs in memory."""
    columns = replace(_BY_GROUP, dtypes=("F16", "BF16", "F32"), suffixes=(".scales",),
                      layout=TRANSPOSED)  # fmt: skip
    order = Plane("order", ("I32",), (".g_idx",), rows=WHOLE, kind="order")
    return Format(
        name=name,
        title=f"INT{bits}",
        planes=(
            Plane("codes", ("I32",), (".qweight",), bits=bits, layout=codes),
            columns,
            replace(_ZERO, suffixes=(".qzeros",), layout=zeros),
            *((order,) if ordered else ()),
        ),
        exact_in=("bf16", "whole", "f32"),
        about=f"INT{bits} with zero points, one {{scale}} scale per {{group}} columns"
        + (" in an order of their own" if ordered else ""),
        values=tuple(float(code) for code in range(2**bits)),
        read_as="" if bits == 8 or ordered else INT4_ZERO.name,
    )


AWQ = _apart("awq", 4, layouts.AWQ, layouts.AWQ_ZEROS)
"""arXiv 2306.00978, as AutoAWQ's version "gemm" stores it."""
GPTQ = _apart("gptq", 4, layouts.BY_INPUT[4], layouts.GPTQ_ZEROS[4])
"""arXiv 2210.17323, as AutoGPTQ stores it."""
GPTQ2 = _apart("gptq2", 4, layouts.BY_INPUT[4], layouts.GPTQ2_ZEROS[4])
GPTQ_ORDER = _apart("gptq-order", 4, layouts.BY_INPUT[4], layouts.GPTQ_ZEROS[4], ordered=True)
GPTQ2_ORDER = _apart("gptq2-order", 4, layouts.BY_INPUT[4], layouts.GPTQ2_ZEROS[4], ordered=True)
GPTQ8 = _apart("gptq8", 8, layouts.BY_INPUT[8], layouts.GPTQ_ZEROS[8])
GPTQ8_ORDER = _apart("gptq8-order", 8, layouts.BY_INPUT[8], layouts.GPTQ_ZEROS[8], ordered=True)
