"""Plain torch in a model file: what is traced, what each function stands for, which pieces become
one node; and that nothing changes a value.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quirky
import torch
from plain_machine import MACHINE
from torch import Tensor, fx, nn
from torch.nn import functional

from hmc.blocks import Embedding, Linear, RMSNorm, Vector
from hmc.checkpoint import Checkpoint
from hmc.errors import CompileError
from hmc.graph import meta
from hmc.graph.printer import graph_text
from hmc.models import FAMILIES, load
from hmc.passes.graph.canonicalise import Canonicalise
from hmc.passes.graph.fuse import Fuse
from hmc.passes.graph.trace import trace
from hmc.passes.manager import run_graph
from hmc.passes.records import Target
from hmc.plan import ModelInfo

Function = Callable[..., Tensor]
WIDTH, HEADS = 12, 3


class Model(nn.Module):
    """Logits of a function of x and y [T, WIDTH], one column c [T, 1], and vectors w [WIDTH] and u
    [WIDTH / HEADS].
    """

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function
        self.embed = Embedding(9, WIDTH)
        self.norm = RMSNorm(WIDTH, 1e-5)
        self.x, self.y = Linear(WIDTH, WIDTH), Linear(WIDTH, WIDTH, bias=True)
        self.c, self.head = Linear(WIDTH, 1), Linear(WIDTH, 7)
        self.w, self.u = Vector(WIDTH), Vector(WIDTH // HEADS)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        h = self.norm(self.embed(ids))
        result = self.function(self.x(h), self.y(h), self.c(h), self.w(), self.u())
        return self.head(result)  # type: ignore[no-any-return]


def target() -> Target:
    """One of which `fuse` needs nothing, where no gate is fused."""
    info = ModelInfo.model_construct()
    return Target(checkpoint=None, info=info, machine=MACHINE, isa="avx2")  # type: ignore[arg-type]


def filled(graph: nn.Module) -> None:
    graph.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in graph.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.6


def rewritten(function: Function) -> fx.GraphModule:
    """The fused graph of a function, which gives what the model gives."""
    with torch.device("meta"):
        model = Model(function)
    graph = trace(model)
    filled(graph)
    ids, positions = torch.randint(0, 9, (5,)), torch.arange(5)
    before = graph(ids, positions)
    run_graph((Canonicalise(), Fuse()), graph, target())
    torch.testing.assert_close(graph(ids, positions), before, rtol=1e-5, atol=1e-6)
    return graph


def texts(graph: fx.GraphModule) -> list[str]:
    """The expressions of the pointwise nodes."""
    found = [meta(node) for node in graph.graph.nodes]
    return [about.attr("expr") for about in found if about.kind == "pointwise"]


def by_head(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, WIDTH // HEADS))


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x, y, c, w, u: x * y - x / 2 + (-y), "x0 * x1 - x0 / 2.0 + -x1"),
        (lambda x, y, c, w, u: torch.sigmoid(x).mul(y.tanh()), "sigmoid(x0) * tanh(x1)"),
        (lambda x, y, c, w, u: functional.gelu(x) + y.relu(), "gelu(x0) + relu(x1)"),
        (lambda x, y, c, w, u: functional.gelu(x, approximate="tanh"), "gelu_tanh(x0)"),
        (lambda x, y, c, w, u: x.clamp(-1, 2) * y.clamp(min=0),
         "minimum(maximum(x0, -1.0), 2.0) * maximum(x1, 0.0)"),
        (lambda x, y, c, w, u: torch.clamp(x, max=1.5), "minimum(x0, 1.5)"),
        (lambda x, y, c, w, u: x**2 + (y * y + 1) ** -0.5, "square(x0) + rsqrt(x1 * x1 + 1.0)"),
        (lambda x, y, c, w, u: functional.softplus(x) * torch.exp(-y), "softplus(x0) * exp(-x1)"),
        (lambda x, y, c, w, u: torch.where(x > y, x * 2, 0.0),
         "where(x0 < x1, x1 * 2.0, 0.0)"),
        (lambda x, y, c, w, u: torch.where(c <= 0, x, y), "where(x0 <= 0.0, x1, x2)"),
        (lambda x, y, c, w, u: x * torch.sigmoid(c) * (1 + w), "x0 * sigmoid(x1) * (1.0 + v0)"),
        (lambda x, y, c, w, u: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w,
         "x0 * rsqrt(mean(square(x0)) + 1e-06) * v0"),
        (lambda x, y, c, w, u: (by_head(x) * (1 + u)).flatten(-2), "x0 * (1.0 + v0)"),
        (lambda x, y, c, w, u: (by_head(x) * by_head(x).sum(-1, keepdim=True)).flatten(-2) * w,
         "x0 * sum(x0) * v0"),
        (lambda x, y, c, w, u: (by_head(x) * y[:, :HEADS].unsqueeze(-1)).reshape(-1, WIDTH),
         "x0 * x1"),
        (lambda x, y, c, w, u: (x.unflatten(-1, (4, 3)) * (1 - torch.exp(u).unsqueeze(-1))
                                ).flatten(-2) + w, "x0 * (1.0 - exp(g0)) + v0"),
        (lambda x, y, c, w, u: torch.minimum(x, y) - torch.maximum(x, w),
         "minimum(x0, x1) - maximum(x0, v0)"),
    ],
)  # fmt: skip
def test_a_piece_is_one_node_in_bf16_for_the_matmul(function: Function, text: str) -> None:
    graph = rewritten(function)
    assert texts(graph) == [text]
    assert [meta(n).dtype for n in graph.graph.nodes if meta(n).kind == "pointwise"] == ["bf16"]


def test_a_value_read_within_a_piece_alone_is_computed_there() -> None:
    def function(x: Tensor, y: Tensor, c: Tensor, w: Tensor, u: Tensor) -> Tensor:
        shared = torch.exp(x)
        return by_head(shared * y).sum(-1, keepdim=True).mul(by_head(shared)).flatten(-2)

    assert texts(rewritten(function)) == ["sum(exp(x0) * x1) * exp(x0)"]


def test_a_value_that_others_read_ends_a_piece() -> None:
    """exp(h) is read by a matmul, so the product after it does not compute it again."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.head = Embedding(9, 8), Linear(8, 8), Linear(8, 7)

        def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
            shared = torch.exp(self.embed(ids))
            return self.head(self.a(shared) * shared)  # type: ignore[no-any-return]

    with torch.device("meta"):
        graph = trace(Shared())
    run_graph((Canonicalise(), Fuse()), graph, target())
    assert texts(graph) == ["exp(x0)", "x0 * b0"]


def test_sums_over_rows_and_over_heads_are_two_pieces() -> None:
    def function(x: Tensor, y: Tensor, c: Tensor, w: Tensor, u: Tensor) -> Tensor:
        rows = x * x.mean(-1, keepdim=True)
        return (by_head(rows) * by_head(rows).mean(-1, keepdim=True)).flatten(-2)

    assert texts(rewritten(function)) == ["x0 * mean(x0)", "x0 * mean(x0)"]


def test_a_long_piece_is_cut() -> None:
    def function(x: Tensor, y: Tensor, c: Tensor, w: Tensor, u: Tensor) -> Tensor:
        for number in range(1, 60):
            x = torch.tanh(x + number * y)
        return x

    assert len(texts(rewritten(function))) > 1


def test_matmuls_get_bf16_where_others_keep_f32() -> None:
    """h is read by a sum and, rounded once, by two matmuls."""

    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.a, self.b = Embedding(9, 8), Linear(8, 8), Linear(8, 8)
            self.head = Linear(8, 7)

        def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
            h = self.embed(ids) * 2
            return self.head(h + self.a(h) + self.b(h))  # type: ignore[no-any-return]

    with torch.device("meta"):
        graph = trace(Post())
    run_graph((Canonicalise(), Fuse()), graph, target())
    read = {
        node.name: meta(node.args[0]) for node in graph.graph.nodes if meta(node).kind == "linear"
    }
    assert {about.dtype for about in read.values()} == {"bf16"}
    assert texts(graph) == ["x0 * 2.0", "x0", "x0"]


class _Calls(nn.Module):
    """x through something."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function, self.embed, self.head = function, Embedding(9, 8), Linear(8, 7)
        self.plain = nn.Parameter(torch.empty(8))

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.head(self.function(self.embed(ids)))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda x: torch.cumsum(x, -1), "cumsum"),
        (lambda x: x.softmax(-1), "softmax"),
        (lambda x: x.sum(-1), "sum"),
        (lambda x: x.mean(0, keepdim=True), "mean"),
        (lambda x: x**3, "pow"),
        (lambda x: x.add(x, alpha=2), "add"),
        (lambda x: x > 0, "gt"),
        (lambda x: (x > 0) * x, "mul"),
        (lambda x: torch.where(x, x, x), "where"),
        (lambda x: x[:, ::2], "getitem"),
        (lambda x: x[0], "getitem"),
        (lambda x: x.unflatten(-1, (2, 4)), "flatten"),
        (lambda x: x.t(), "t"),
        (lambda x: x.reshape(-1, 3), "reshape"),
        (lambda x: x * torch.ones(8), "get_attr.*Vector"),
        (lambda x: x.unflatten(-1, (2, 4)) * x[:, :4].unflatten(-1, (1, 4)), "mul"),
        (lambda x: x.clamp(), "clamp"),
    ],
)  # fmt: skip
def test_what_is_not_on_the_list_is_named(function: Callable[[Any], Any], named: str) -> None:
    with torch.device("meta"):
        model = _Calls(function)
    with pytest.raises(CompileError, match=named):
        trace(model)


def test_arithmetic_on_ids_is_refused() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = Embedding(9, 8)

        def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
            return self.embed(ids + 1)  # type: ignore[no-any-return]

    with torch.device("meta"), pytest.raises(CompileError, match="add"):
        trace(Shifted())


@pytest.fixture
def lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Target]:
    """The traced graph of the quirky family and a context for it."""
    monkeypatch.setitem(FAMILIES, "quirky", quirky.FAMILY)
    found = Checkpoint.open(quirky.write(tmp_path))
    model = load(found.config)
    return trace(model.module), Target(found, model.info, MACHINE, "avx512_bf16")


def test_quirks_fuse_to_the_golden_graph_with_the_same_values(
    lowered: tuple[fx.GraphModule, Target], golden: Callable[[str, str], None]
) -> None:
    graph, about = lowered
    filled(graph)
    ids, positions = torch.arange(9), torch.arange(9)
    before = graph(ids, positions)
    lowered_graph = run_graph((Canonicalise(), Fuse()), graph, about)
    torch.testing.assert_close(graph(ids, positions), before, rtol=1e-4, atol=1e-4)
    golden("passes/quirky.txt", graph_text(graph.graph))
    choices = {decision.subject: decision.choice for decision in lowered_graph.decisions}
    assert choices["b0 * sigmoid(x0)"] == "one pointwise node, 2 times"
