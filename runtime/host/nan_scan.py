"""Whether FP8 weights are all numbers, asked once, natively, when they are opened for a tier whose
kernels would take NaN codes for some (codegen/formats/unpack.py).
"""

from __future__ import annotations

from typing import cast

import numpy as np
import numpy.typing as npt

from hmc.codegen.arguments import pack
from hmc.codegen.jit import Jit
from hmc.codegen.native import takes_nan
from hmc.codegen.spec import KernelSpec
from hmc.errors import TensorError
from hmc.plan.model import ExpertRole
from hmc.runtime.host.pool import Pool
from hmc.runtime.host.program import ProgramBuilder
from hmc.runtime.weights.fill import Progress
from hmc.runtime.weights.store import WeightStore
from hmc.runtime.weights.tensors import Key

_PIECE = 1 << 20
"""Bytes that one worker looks at in one go: small enough that workers end together."""
_CALL = 1024
"""Pieces of one call: a second of a slow disk, after which Ctrl-C is heard and progress shown."""


def check_numbers(
    store: WeightStore, pool: Pool, jit: Jit, isa: str, progress: Progress | None = None
) -> None:
    """Read the FP8 weights of `store` once, where tier `isa` needs that.

    Raises `TensorError` naming the first tensor with a NaN code (0x7F or 0xFF).
    """
    groups = [
        (group.key, addresses, group.form.bytes)
        for group, addresses in store.codes()
        if takes_nan(isa, group.format)
    ]
    if not groups:
        return
    spec, nowhere = KernelSpec.of("nan_codes", isa), pack("nan_codes", spans=0, count=0, found=0)
    builder = ProgramBuilder()
    builder.add(jit.get(spec), nowhere, tag=0)
    program = builder.build()
    done, total = 0, sum(len(addresses) * size for _, addresses, size in groups)
    for key, addresses, size in groups:
        pieces = _pieces(addresses, size)
        each = len(pieces) // len(addresses)
        for first in range(0, len(pieces), _CALL):
            spans = pieces[first : first + _CALL]
            found = np.zeros(len(spans), np.int64)
            program.patch_all(spans=spans.ctypes.data, count=len(spans), found=found.ctypes.data)
            pool.run(program.records)
            if found.any():
                number = (first + int(found.argmax())) // each
                raise TensorError(
                    f"{_name(store, key, number)}: its FP8 codes hold a NaN (0x7F or 0xFF): the"
                    " checkpoint is damaged, fetch or convert it again"
                )
            done += int(spans[:, 1].sum())
            if progress is not None:
                progress("checking weights", done, total)


def _pieces(addresses: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    """Spans i64 [pieces, 2] of tensors of `size` bytes, as many of each, in order."""
    starts = np.arange(0, size, _PIECE, dtype=np.int64)
    spans = np.empty((len(addresses), len(starts), 2), np.int64)
    spans[..., 0] = addresses[:, None] + starts
    spans[..., 1] = np.minimum(_PIECE, size - starts)
    return spans.reshape(-1, 2)


def _name(store: WeightStore, key: Key, number: int) -> str:
    """The checkpoint's name of tensor `number` of a group."""
    if key[0] == "expert":
        _, layer, role, _ = key
        return store.experts(cast(int, layer), cast(ExpertRole, role)).pattern.format(e=number)
    return str(key[1])
