"""`pointwise` against float64: every operation, every kind of operand, odd widths, any workers."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_calls import address, as_format, filled, from_bf16, guarded, in_turn
from kernel_meanings import pointwise
from prefill_data import need

from hmc.codegen.checks import check_spec
from hmc.codegen.expr import MASKS, OPERATIONS, REDUCTIONS
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.rowwise import BF16_INPUTS, INPUTS, WEIGHTS, Rowwise
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError


def run(
    jit: Jit,
    isa: str,
    expr: str,
    width: int,
    columns: dict[str, int],
    *,
    groups: int = 1,
    tokens: int = 3,
    out: str = "f32",
    scale: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(result in f64, reference) of random operands; the same for 1, 2 and 3 workers."""
    rng = np.random.default_rng(width)
    spec = KernelSpec.of(
        "pointwise", isa, out=out, expr=expr, width=width, groups=groups, **columns
    )
    data, values = {}, {}
    for name, count in columns.items():
        shape = (count,) if name in WEIGHTS else (tokens, count + 1)
        form = "bf16" if name in BF16_INPUTS else "f32"
        data[name], exact = as_format(scale * rng.standard_normal(shape), form)
        values[name] = exact[..., :count]
    want = pointwise(Rowwise.of(spec), values)
    args = {name: address(data.get(name)) for name in INPUTS + WEIGHTS}
    args |= {f"{name}_stride": columns.get(name, -1) + 1 for name in INPUTS}
    results = []
    for workers in (1, 2, 3):
        y = filled((tokens, want.shape[1] + 2), np.uint16 if out == "bf16" else np.float32)
        in_turn(jit, spec, workers, **args, y=address(y), y_stride=y.shape[1], tokens=tokens)
        assert (y[:, want.shape[1] :] == 77).all()
        results.append(y[:, : want.shape[1]].copy())
    assert all(np.array_equal(results[0], other, equal_nan=True) for other in results)
    return (from_bf16(results[0]) if out == "bf16" else results[0].astype(np.float64)), want


PLAIN = [op for op in OPERATIONS if op not in MASKS | REDUCTIONS | {"where"}]


def text_of(op: str) -> str:
    """An operation of as many inputs as it takes; roots and quotients of what is positive."""
    second = "square(x1) + 0.5" if op == "div" else "x1"
    first = "square(x0) + 1e-06" if op.endswith("sqrt") else "x0"
    return f"{op}({first})" if OPERATIONS[op] == 1 else f"{op}({first}, {second})"


@pytest.mark.parametrize("isa", TIERS)
def test_every_operation(jit: Jit, isa: str) -> None:
    """Large and small values, all operations in one kernel a size."""
    need(isa)
    for op in PLAIN:
        text = text_of(op)
        columns = {name: 64 for name in ("x0", "x1") if name in text}
        for scale in (1e-3, 4.0):
            y, want = run(jit, isa, text, 64, columns, tokens=16, scale=scale)
            bound = (
                1e-5 if op.startswith("gelu") else 2e-6
            )  # far below zero it is an exponential of x^2
            assert (np.abs(y - want) <= bound * np.abs(want) + 1e-35).all(), (op, scale)


@pytest.mark.parametrize("isa", TIERS)
def test_choices_and_nan(jit: Jit, isa: str) -> None:
    need(isa)
    text = "where(x0 < x1, minimum(x0, 0.5), maximum(x1, -0.25)) + where(x0 <= 0.0, 1.0, x1)"
    y, want = run(jit, isa, text, 33, {"x0": 33, "x1": 33})
    assert np.abs(y - want).max() <= 1e-6
    x = guarded(np.array([[np.nan, 1, -1, np.inf, -np.inf, 0, 200, -200]], np.float32))
    for expr, exact in (
        ("relu(x0)", [np.nan, 1, 0, np.inf, 0, 0, 200, 0]),
        ("minimum(x0, 7.0)", [np.nan, 1, -1, 7, -np.inf, 0, 7, -200]),
        ("tanh(x0)", [np.nan, np.tanh(1), -np.tanh(1), 1, -1, 0, 1, -1]),
        ("softplus(x0)", [np.nan, 1.3132616, 0.3132617, np.inf, 0, 0.6931472, 200, 0]),
        ("silu(relu(x0))", [np.nan, 0.7310586, 0, np.inf, 0, 0, 200, 0]),
    ):
        y = filled((1, 8), np.float32)
        spec = KernelSpec.of("pointwise", isa, expr=expr, width=8, groups=1, x0=8)
        args = dict.fromkeys([*INPUTS, *WEIGHTS, *(f"{name}_stride" for name in INPUTS)], 0)
        args |= {"x0": address(x), "y": address(y), "y_stride": 8, "tokens": 1}
        in_turn(jit, spec, 1, **args)
        np.testing.assert_allclose(y[0], exact, rtol=1e-6, atol=1e-30, err_msg=expr)


@pytest.mark.few(8)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("width", [7, 8, 9, 31, 33, 1000])
def test_odd_widths_and_formats(jit: Jit, isa: str, width: int) -> None:
    need(isa)
    expr = "silu(b0) * x1 * (v0 + 1.0) + b2 * v1 + x0"
    columns = {"b0": width, "x1": width, "b2": 1, "v0": width, "v1": 1, "x0": 1}
    y, want = run(jit, isa, expr, width, columns, tokens=5)
    assert np.abs(y - want).max() <= 1e-6 * np.abs(want).max()
    y, want = run(jit, isa, expr, width, columns, tokens=1, out="bf16")
    assert (np.abs(y - want) <= 2.0**-8 * np.abs(want) + 1e-6).all()


@pytest.mark.few(5)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(("groups", "size"), [(1, 200), (3, 33), (5, 7), (4, 1)])
def test_sums_by_group(jit: Jit, isa: str, groups: int, size: int) -> None:
    """A norm by group with one factor a group, a norm of norms, and a result a group."""
    need(isa)
    width = groups * size
    norm = "x0 * rsqrt(mean(square(x0)) + 1e-06) * (v0 + 1.0) * b1"
    columns = {"x0": width, "v0": size, "b1": groups}
    y, want = run(jit, isa, norm, width, columns, groups=groups)
    assert np.abs(y - want).max() <= 2e-6 * np.abs(want).max()
    twice = "exp(x0 - mean(x0)) / sum(exp(x0 - mean(x0)))"
    y, want = run(jit, isa, twice, width, {"x0": width}, groups=groups)
    assert np.abs(y - want).max() <= 2e-6
    y, want = run(jit, isa, "sum(x0 * v0) + b1", width, columns, groups=groups)
    assert y.shape == (3, width if size == 1 else groups)
    assert np.abs(y - want).max() <= 1e-5
    text, columns = (
        "exp(-exp(g0) * softplus(x0 + v0)) + b1",
        {"x0": width, "v0": width, "b1": groups},
    )
    y, want = run(jit, isa, text, width, {**columns, "g0": groups}, groups=groups)
    assert np.abs(y - want).max() <= 2e-6 * np.abs(want).max()


def test_a_long_row_is_shared(jit: Jit) -> None:
    """One token and many workers: every worker has a piece of the row."""
    isa = next(isa for isa in reversed(TIERS))
    need(isa)
    y, want = run(jit, isa, "x0 * 2.0", 5003, {"x0": 5003}, tokens=1)
    assert (y == want).all()


@pytest.mark.parametrize(
    ("expr", "sizes"),
    [
        ("x0 < 1.0", {"width": 8, "groups": 1, "x0": 8}),
        ("x0 + x1", {"width": 8, "groups": 1, "x0": 8}),
        ("x0 + 1.0", {"width": 8, "groups": 1, "x0": 8, "x1": 8}),
        ("x0 + 1.0", {"width": 8, "groups": 3, "x0": 8}),
        ("x0 + 1.0", {"width": 8, "groups": 2, "x0": 4}),
        ("x0 + v0", {"width": 8, "groups": 2, "x0": 8, "v0": 2}),
        ("silu(", {"width": 8, "groups": 1, "x0": 8}),
        ("gate * 2.0", {"width": 8, "groups": 1, "gate": 8}),
    ],
)
def test_what_does_not_fit_is_refused(expr: str, sizes: dict[str, int]) -> None:
    with pytest.raises(KernelError, match=r"pointwise|expression"):
        check_spec(KernelSpec.of("pointwise", "avx2", expr=expr, **sizes))
