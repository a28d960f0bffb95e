"""Block formats of GGUF (ggml's block types): structs of codes, scales and minima, one after the
other along a row. What they mean stands in `blocks.py`.
"""

from __future__ import annotations

from hmc.formats.base import Format, Plane


def _blocks(name: str, dtype: str, columns: int, size: int) -> Format:
    plane = Plane("blocks", (dtype,), block=(columns, size), ragged=False)
    about = f"GGUF {dtype.removeprefix('GGML_')}, blocks of {columns}"
    return Format(name, dtype.removeprefix("GGML_"), (plane,), exact_in=("f32",), about=about)


GGUF = (
    _blocks("q4_0", "Q4_0", 32, 18),
    _blocks("q8_0", "Q8_0", 32, 34),
    _blocks("q4_k", "Q4_K", 256, 144),
    _blocks("q5_k", "Q5_K", 256, 176),
    _blocks("q6_k", "Q6_K", 256, 210),
    _blocks("iq4_xs", "IQ4_XS", 256, 136),
    _blocks("ggml_mxfp4", "GGML_MXFP4", 32, 17),
)
