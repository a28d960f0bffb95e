"""Whole numbers of 4 and 8 bits with a scale for every group of columns of a row, or for a row:
compressed-tensors' packed INT4 (codes -8 to 7, stored plus 8) without and with zero points, its
INT8, AWQ and GPTQ.
"""

from __future__ import annotations

from dataclasses import replace

from hmc.formats import layouts
from hmc.formats.base import GROUP, WHOLE, Format, Plane
from hmc.formats.dialects import Find, awq, compressed_tensors, gptq
from hmc.formats.layouts import PACKED_ZEROS, SIGNED_ZEROS, TRANSPOSED, Layout


def _packed(name: str, bits: int, *ends: str, symmetric: bool = True) -> Find:
    """Packed whole numbers of compressed-tensors."""
    return compressed_tensors(
        name, ("_packed", "_scale", *ends), ("pack-quantized",), ("int", bits),
        strategies=("group", "channel"), group=-1, symmetric=symmetric,
    )  # fmt: skip


_PLAIN = ("int-quantized", "naive-quantized")
_WHOLE_FLOATS = ("BF16", "F32", "F16")
_BY_GROUP = Plane("scale", _WHOLE_FLOATS, ("_scale",), columns=GROUP, ragged=False,
                  kept=("BF16", "F32", "F16"))  # fmt: skip
_ZERO = Plane("zero", ("I32",), ("_zero_point",), columns=GROUP, ragged=False, kind="zero",
              layout=PACKED_ZEROS[4])  # fmt: skip
_CODES = Plane("codes", ("I32",), ("_packed",), bits=4)

INT4 = Format(
    name="int4",
    title="INT4",
    planes=(_CODES, _BY_GROUP),
    exact_in=("bf16", "whole", "f32"),
    about="INT4 symmetric, one {scale} scale per {group} columns",
    values=tuple(float(code - 8) for code in range(16)),
    find=_packed("int4", 4),
)
INT4_ZERO = Format(
    name="int4-zero",
    title="INT4",
    planes=(_CODES, _BY_GROUP, _ZERO),
    exact_in=("bf16", "whole", "f32"),
    about="INT4 with zero points, one {scale} scale per {group} columns",
    values=tuple(float(code) for code in range(16)),
    find=_packed("int4-zero", 4, "_zero_point", symmetric=False),
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
    find=compressed_tensors("int8", ("", "_scale"), _PLAIN, ("int", 8), strategies=("channel",)),
)  # fmt: skip
INT8_PACKED = Format(
    name="int8-packed",
    title="INT8",
    planes=(replace(_CODES, bits=8), _BY_GROUP),
    exact_in=("bf16", "whole", "f32"),
    about="INT8 symmetric, one {scale} scale per {group} columns",
    values=tuple(float(code - 128) for code in range(256)),
    find=_packed("int8-packed", 8),
)
INT8_PACKED_ZERO = replace(
    INT8_PACKED,
    name="int8-packed-zero",
    planes=(*INT8_PACKED.planes, replace(_ZERO, layout=PACKED_ZEROS[8])),
    about="INT8 with zero points, one {scale} scale per {group} columns",
    values=tuple(float(code) for code in range(256)),
    find=_packed("int8-packed-zero", 8, "_zero_point", symmetric=False),
)
INT8_GROUP = replace(
    INT8,
    name="int8-group",
    planes=(INT8.codes, _BY_GROUP),
    about=INT8_PACKED.about,
    find=compressed_tensors("int8-group", ("", "_scale"), _PLAIN, ("int", 8),
                            strategies=("group",), group=-1),
)  # fmt: skip
INT8_ZERO = replace(
    INT8_GROUP,
    name="int8-zero",
    planes=(*INT8_GROUP.planes, replace(_ZERO, dtypes=("I8",), layout=SIGNED_ZEROS)),
    about=INT8_PACKED_ZERO.about,
    find=compressed_tensors("int8-zero", ("", "_scale", "_zero_point"), _PLAIN, ("int", 8),
                            strategies=("group", "channel"), group=-1, symmetric=False),
)  # fmt: skip


_ORDERED = {4: "gptq-order", 8: "gptq8-order"}
"""What kernels know weights with an order of columns as, by bits."""


def _apart(
    name: str, bits: int, codes: Layout, zeros: Layout, find: Find, ordered: bool = False
) -> Format:
    """Weights of AWQ and GPTQ, whose planes lie by inputs in files and by outputs in memory."""
    columns = replace(_BY_GROUP, dtypes=("F16", "BF16", "F32"), suffixes=(".scales",),
                      layout=TRANSPOSED)  # fmt: skip
    order = Plane("order", ("I32",), (".g_idx",), rows=WHOLE, kind="order",
                  layout=layouts.GROUP_OF)  # fmt: skip
    plain = INT4_ZERO if bits == 4 else INT8_PACKED_ZERO
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
        find=find,
        read_as=_ORDERED[bits] if ordered else plain.name,
    )


def _gptq(name: str, bits: int, version: str = "gptq", ordered: bool = False) -> Format:
    zeros = layouts.GPTQ2_ZEROS if version == "gptq_v2" else layouts.GPTQ_ZEROS
    ends = (*_APART, ".g_idx") if ordered else _APART
    find = gptq(name, ends, bits, version, ordered=ordered)
    codes = (layouts.BY_GROUP if ordered else layouts.BY_INPUT)[bits]
    return _apart(name, bits, codes, zeros[bits], find, ordered)


_APART = (".qweight", ".scales", ".qzeros")

AWQ = _apart("awq", 4, layouts.AWQ, layouts.AWQ_ZEROS, awq("awq", _APART, 4))
"""arXiv 2306.00978, as AutoAWQ's version "gemm" stores it."""
GPTQ = _gptq("gptq", 4)
"""arXiv 2210.17323, as AutoGPTQ stores it."""
GPTQ2 = _gptq("gptq2", 4, "gptq_v2")
GPTQ_ORDER = _gptq("gptq-order", 4, ordered=True)
GPTQ2_ORDER = _gptq("gptq2-order", 4, "gptq_v2", ordered=True)
GPTQ8 = _gptq("gptq8", 8)
GPTQ8_ORDER = _gptq("gptq8-order", 8, ordered=True)
GPTQ2_8 = _gptq("gptq2-8", 8, "gptq_v2")
GPTQ2_8_ORDER = _gptq("gptq2-8-order", 8, "gptq_v2", ordered=True)
