"""`embed` and `gather_rows`: exact, in every format and tier."""

from __future__ import annotations

import numpy as np
import pytest
from format_ops import columns
from format_rows import made
from kernel_calls import address, as_format, filled, floats, guarded, in_turn
from kernel_meanings import rows
from prefill_data import need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError
from hmc.formats import Format
from hmc.formats.gguf import GGUF


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("weight", ["bf16", "fp16", "f32"])
@pytest.mark.parametrize("width", [7, 100, 264])
def test_embed_is_exact(jit: Jit, isa: str, weight: str, width: int) -> None:
    need(isa)
    rng = np.random.default_rng(width)
    table, values = as_format(rng.standard_normal((11, width)), weight)
    spec = KernelSpec.of("embed", isa, weight=weight, width=width)
    for tokens, workers in ((1, 2), (3, 1), (33, 4)):
        ids = guarded(np.append(rng.integers(0, 11, tokens - 1), 10).astype(np.int32))
        y = filled((tokens, width + 2), np.float32)
        in_turn(
            jit, spec, workers, table=address(table), ids=address(ids), y=address(y),
            y_stride=width + 2, tokens=tokens,
        )  # fmt: skip
        assert (y[:, width:] == 77).all()
        assert (y[:, :width] == rows(values, ids)).all()


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("row", GGUF, ids=lambda row: row.name)
def test_embed_of_blocks_is_exact(jit: Jit, isa: str, row: Format) -> None:
    need(isa)
    rng = np.random.default_rng(1)
    width, _ = columns(row)
    table = made(rng, row, 11, width, keep=guarded)
    ids, y = guarded(np.array([10, 0, 7, 10], np.int32)), filled((4, width + 2), np.float32)
    spec = KernelSpec.of("embed", isa, weight=row.name, width=width)
    in_turn(
        jit, spec, 3, table=table.codes, ids=address(ids), y=address(y),
        y_stride=width + 2, tokens=4,
    )  # fmt: skip
    assert (y[:, width:] == 77).all()
    assert np.array_equal(y[:, :width], table.values[ids])


@pytest.mark.parametrize("isa", TIERS)
def test_gather_rows_is_exact(jit: Jit, isa: str) -> None:
    need(isa)
    rng = np.random.default_rng(1)
    x = floats(rng, 9, 41)
    picks = guarded(np.array([8, 0, 8, 3], np.int32))
    y = filled((4, 37), np.float32)
    in_turn(
        jit, KernelSpec.of("gather_rows", isa, width=37), 3, x=address(x), x_stride=41,
        rows=address(picks), y=address(y), y_stride=37, tokens=4,
    )  # fmt: skip
    assert (y == rows(x[:, :37], picks)).all()


def test_a_table_format_without_a_load_is_refused(jit: Jit) -> None:
    with pytest.raises(KernelError, match="fp8"):
        jit.ir_text(KernelSpec.of("embed", "avx2", weight="fp8", width=8))
