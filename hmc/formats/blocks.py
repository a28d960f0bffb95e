"""What blocks of GGUF's formats mean, in numpy: structs of codes, scales and minima, as rows of
bytes -> f32. The facts are those of ggml's `ggml-common.h` and `ggml-quants.c`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Decode = Callable[[npt.NDArray[Any], int], Floats]

BLOCKS: Mapping[str, Decode] = {}
"""By the name of a format: rows of bytes u8 [n, bytes a row], columns -> f32 [n, columns]."""

HALVES_AT: Mapping[str, tuple[int, ...]] = {}
"""By the name of a format: at which bytes of a block its f16 numbers are."""
