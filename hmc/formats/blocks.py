"""What blocks of GGUF's formats mean, in numpy: structs of codes, scales and minima, as rows of
bytes -> f32. The facts are those of ggml's `ggml-common.h` and `ggml-quants.c`.

Of a byte with two codes the low half is the earlier one in a run of columns, the high half the one
a run further; a code is a whole number or an index of a table. Every product and sum is rounded to
f32, in the order ggml takes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.formats.codebooks import E2M1_DOUBLED, IQ4

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Decode = Callable[[npt.NDArray[Any], int], Floats]

_E2M1_DOUBLED = np.array(E2M1_DOUBLED, np.float32)
_IQ4 = np.array(IQ4, np.float32)


def _fields(packed: Bytes, run: int, each: int) -> Bytes:
    """Codes [n, 8 / each x bytes] of `each` bits, of bytes [n, bytes]: of every `run` bytes the
    lowest bits, then the next ones, and so on.
    """
    shifts = np.arange(0, 8, each, dtype=np.uint8)[:, None]
    split = packed.reshape(len(packed), -1, 1, run) >> shifts & np.uint8(2**each - 1)
    return split.reshape(len(packed), -1)


def _halves(packed: Bytes, run: int) -> Bytes:
    """Codes of 4 bits."""
    return _fields(packed, run, 4)


def _f16(blocks: Bytes, at: int) -> Floats:
    """The f16 number at a byte of each block: f32 [n, 1]."""
    found: Floats = np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)
    return found


def _scaled(codes: npt.NDArray[Any], scales: Floats) -> Floats:
    """Codes [n, k] times scales [n, groups] of neighbouring codes."""
    grouped = codes.astype(np.float32).reshape(*scales.shape, -1)
    found: Floats = (scales[..., None] * grouped).reshape(len(codes), -1)
    return found


def _q4_0(blocks: Bytes) -> Floats:
    return _scaled(_halves(blocks[:, 2:], 16).astype(np.int8) - 8, _f16(blocks, 0))


def _q4_1(blocks: Bytes) -> Floats:
    return _scaled(_halves(blocks[:, 4:], 16), _f16(blocks, 0)) + _f16(blocks, 2)


def _five(blocks: Bytes, at: int) -> Bytes:
    """The fifth bits of 32 codes in four bytes, then the others."""
    high = _fields(np.ascontiguousarray(blocks[:, at : at + 4]), 1, 1)
    return _halves(blocks[:, at + 4 :], 16) | high << np.uint8(4)


def _q5_0(blocks: Bytes) -> Floats:
    return _scaled(_five(blocks, 2).astype(np.int8) - 16, _f16(blocks, 0))


def _q5_1(blocks: Bytes) -> Floats:
    return _scaled(_five(blocks, 4), _f16(blocks, 0)) + _f16(blocks, 2)


def _iq4_nl(blocks: Bytes) -> Floats:
    return _scaled(_IQ4[_halves(blocks[:, 2:], 16)], _f16(blocks, 0))


def _q8_0(blocks: Bytes) -> Floats:
    return _scaled(blocks[:, 2:].view(np.int8), _f16(blocks, 0))


def _scales_and_minima(blocks: Bytes) -> tuple[Floats, Floats]:
    """Of the eight groups of a block: two f16 numbers, each times eight of 6 bits, which lie in
    twelve bytes. The first four are the low 6 bits of bytes 0 to 3 (minima: 4 to 7); of the others
    the low 4 bits stand in bytes 8 to 11, minima in the high half, and the high 2 bits on top of
    the first ones.
    """
    first, second, last = (blocks[:, at : at + 4] for at in (4, 8, 12))
    scales = np.concatenate((first & 63, last & 15 | first >> 2 & 48), 1)
    minima = np.concatenate((second & 63, last >> 4 | second >> 2 & 48), 1)
    return (
        _f16(blocks, 0) * scales.astype(np.float32),
        _f16(blocks, 2) * minima.astype(np.float32),
    )


def _less(scaled: Floats, minima: Floats) -> Floats:
    found: Floats = (scaled.reshape(*minima.shape, -1) - minima[..., None]).reshape(len(scaled), -1)
    return found


def _q2_k(blocks: Bytes) -> Floats:
    """A byte for each 16 columns: the scale in the low half, the minimum in the high one."""
    scales = _f16(blocks, 80) * (blocks[:, :16] & np.uint8(15)).astype(np.float32)
    minima = _f16(blocks, 82) * (blocks[:, :16] >> np.uint8(4)).astype(np.float32)
    return _less(_scaled(_fields(blocks[:, 16:80], 32, 2), scales), minima)


def _q3_k(blocks: Bytes) -> Floats:
    """The third bits of all codes come first; sixteen scales, less 32: four bits each in eight
    bytes, two in four bytes.
    """
    codes = _fields(blocks[:, 32:96], 32, 2) | _fields(blocks[:, :32], 32, 1) << 2
    both = _fields(blocks[:, 96:104], 8, 4) | _fields(blocks[:, 104:108], 4, 2) << 4
    scales = _f16(blocks, 108) * (both.astype(np.int8) - 32).astype(np.float32)
    return _scaled(codes.astype(np.int8) - 4, scales)


def _q4_k(blocks: Bytes) -> Floats:
    scales, minima = _scales_and_minima(blocks)
    return _less(_scaled(_halves(blocks[:, 16:], 32), scales), minima)


def _q5_k(blocks: Bytes) -> Floats:
    """Byte i of the 32 of high bits has those of column i of each of the eight groups."""
    scales, minima = _scales_and_minima(blocks)
    codes = _halves(blocks[:, 48:], 32) | _fields(blocks[:, 16:48], 32, 1) << 4
    return _less(_scaled(codes, scales), minima)


def _q6_k(blocks: Bytes) -> Floats:
    """Two halves of 128 columns; byte i of 32 has the high bits of four columns, 32 apart."""
    codes = _halves(blocks[:, :128], 64) | _fields(blocks[:, 128:192], 32, 2) << 4
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _f16(blocks, 208)
    return _scaled(codes.astype(np.int8) - 32, scales)


def _iq4_xs(blocks: Bytes) -> Floats:
    """Scales of eight groups of 32, less 32: four bits each in four bytes, two in two bytes."""
    both = _fields(blocks[:, 4:8], 1, 4) | _fields(blocks[:, 2:4], 1, 2) << 4
    scales = _f16(blocks, 0) * (both.astype(np.int8) - 32).astype(np.float32)
    return _scaled(_IQ4[_halves(blocks[:, 8:], 16)], scales)


def _mxfp4(blocks: Bytes) -> Floats:
    """E2M1 codes by a power of two; the table is doubled and the power halved, as in ggml."""
    powers = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128).astype(np.float32)
    return _scaled(_E2M1_DOUBLED[_halves(blocks[:, 1:], 16)], powers)


def _rows(columns_bytes: int, decode: Callable[[Bytes], Floats]) -> Decode:
    """Rows of whole blocks, decoded all at once."""

    def rows(data: npt.NDArray[Any], columns: int) -> Floats:
        blocks = np.ascontiguousarray(data).reshape(-1, columns_bytes)
        return decode(blocks).reshape(len(data), columns)

    return rows


BLOCKS: Mapping[str, Decode] = {
    "q4_0": _rows(18, _q4_0),
    "q4_1": _rows(20, _q4_1),
    "q5_0": _rows(22, _q5_0),
    "q5_1": _rows(24, _q5_1),
    "q8_0": _rows(34, _q8_0),
    "q2_k": _rows(84, _q2_k),
    "q3_k": _rows(110, _q3_k),
    "q4_k": _rows(144, _q4_k),
    "q5_k": _rows(176, _q5_k),
    "q6_k": _rows(210, _q6_k),
    "iq4_nl": _rows(18, _iq4_nl),
    "iq4_xs": _rows(136, _iq4_xs),
    "ggml_mxfp4": _rows(17, _mxfp4),
}
"""By the name of a format: rows of bytes u8 [n, bytes a row], columns -> f32 [n, columns]."""

HALVES_AT: Mapping[str, tuple[int, ...]] = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,),
    "q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,),
    "iq4_nl": (0,), "iq4_xs": (0,),
}  # fmt: skip
"""By the name of a format: at which bytes of a block its f16 numbers are."""


def put_scale(name: str, blocks: Bytes, value: float) -> None:
    """Make `value` every float of blocks [n, bytes a block], by which all their codes are
    multiplied; of a format with powers of two alone the one nearest to it.
    """
    if name not in HALVES_AT:
        blocks[:, 0] = round(math.log2(value)) + 127
        return
    for at in HALVES_AT[name]:
        blocks[:, at : at + 2] = np.array([value], np.float16).view(np.uint8)
