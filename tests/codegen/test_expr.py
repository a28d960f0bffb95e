"""Expressions as text and as trees: one text a tree, bounds, and what is refused."""

from __future__ import annotations

import pytest

from hmc.codegen.expr import (
    MAX_DEPTH,
    OPERATIONS,
    Expr,
    apply,
    const,
    evaluate,
    leaf,
    parse,
    substitute,
    temporaries,
)
from hmc.errors import KernelError


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("silu(gate)*up", "silu(gate) * up"),
        ("a - (b - c) - d", "a - (b - c) - d"),
        ("(a - b) - c", "a - b - c"),
        ("a + b * c / (d * e)", "a + b * c / (d * e)"),
        ("-(a + b) * --c", "-(a + b) * --c"),
        ("a - -1 + -a", "a - -1.0 + -a"),
        ("-(1 * a)", "-(1.0 * a)"),
        ("a * 0.000001", "a * 1e-06"),
        ("-0 * a", "0.0 * a"),
        ("where(a <= -7, (a), b < c)", ""),
        ("where(a <= -7, (a), b)", "where(a <= -7.0, a, b)"),
        ("x0 * rsqrt(mean(square(x0)) + 1e-5)", "x0 * rsqrt(mean(square(x0)) + 1e-05)"),
        ("add(a, less(a, b))", ""),
    ],
)
def test_one_text_for_each_tree(text: str, canonical: str) -> None:
    if not canonical:
        with pytest.raises(KernelError, match="comparison"):
            parse(text)
        return
    tree = parse(text)
    assert str(tree) == canonical
    assert parse(canonical) == tree
    assert hash(parse(canonical)) == hash(tree)


def test_every_operation_survives_its_text() -> None:
    mask = apply("less", leaf("m"), leaf("n"))
    for op, count in OPERATIONS.items():
        for inside in (leaf("b"), apply("neg", leaf("b")), apply("sub", leaf("b"), const(-2))):
            args = (mask, inside, inside) if op == "where" else (inside,) * count
            tree = apply(op, *args)
            assert parse(str(tree)) == tree


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its end at character 1"),
        ("a +", "its end at character 4"),
        ("a $ b", "'\\$' at character 3"),
        ("a b", "'b' at character 3"),
        ("(a", "its end"),
        ("a)", "'\\)' at character 2"),
        ("frob(a)", "unknown operation 'frob'"),
        ("silu(a, b)", "silu takes 1 arguments, not 2"),
        ("silu", "'silu' is no name"),
        ("1 + 2", "constants alone"),
        ("sum(1.0) * a", "constants alone"),
        ("1e999 * a", "not finite"),
        ("a < b < c", "argument 1 of less is a comparison"),
        ("where(a, b, c)", "argument 1 of where is no comparison"),
        ("a" * 5000, "characters are more than"),
        ("(" * 300 + "a" + ")" * 300, "nested too deeply"),
        ("-" * 300 + "a", "nested too deeply"),
        ("+".join("a" * 80), "at most 128, 32 deep"),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        parse(text)


def test_bounds_hold_for_trees_that_are_no_text() -> None:
    tree: Expr = leaf("a")
    for _ in range(MAX_DEPTH):
        tree = apply("neg", tree)
    with pytest.raises(KernelError, match="deep"):
        apply("neg", tree)
    wide = parse(" * ".join("a" * 30))
    with pytest.raises(KernelError, match="nodes"):
        apply("add", apply("add", wide, wide), wide)


def test_leaves_and_substitution() -> None:
    tree = parse("b * sigmoid(a) + b")
    assert tree.leaves == ("b", "a")
    assert str(substitute(tree, {"b": parse("x + y")})) == "(x + y) * sigmoid(a) + (x + y)"
    assert substitute(tree, {}) == tree


def test_what_occurs_twice_is_computed_once() -> None:
    calls: list[str] = []

    def noted(op: str) -> object:
        def call(*args: str) -> str:
            calls.append(op)
            return f"{op}({','.join(args)})"

        return call

    table = {op: noted(op) for op in OPERATIONS}
    tree = parse("exp(a) * exp(a) + exp(a)")
    value = evaluate(tree, str, table, str)  # type: ignore[arg-type]
    assert value == "add(mul(exp(a),exp(a)),exp(a))"
    assert calls == ["exp", "mul", "add"]
    assert evaluate(tree, str, table, str, {parse("exp(a)"): "e"}) == "add(mul(e,e),e)"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "count"),
    [("a", 0), ("silu(a) * b", 2), ("(a + b) * (a - b)", 3), ("square(silu(a) * b)", 2)],
)
def test_temporaries(text: str, count: int) -> None:
    assert temporaries(parse(text)) == count
