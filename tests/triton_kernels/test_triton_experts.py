"""Routed experts in Triton's interpreter, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from interpreted import error
from triton_weights import random_weight, random_x

from hmc.blocks.pointwise import activated
from hmc.codegen.expr import SWIGLU, has_gate, weighs
from hmc.codegen.triton import table
from hmc.formats import format_of
from hmc.runtime.device_ops.triton.launch import Experts, Workspace, experts

HIDDEN, INNER, ALL, TOP_K = 96, 160, 6, 3
BOUND = 3e-7
Values = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Layer:
    """Experts of a layer, of which a step has some."""

    held: Experts
    kept: object
    values: dict[int, Values]
    biases: dict[int, tuple[torch.Tensor, ...]]
    act: str = SWIGLU

    @staticmethod
    def of(
        form: str, down: str, ids: list[int], bias: torch.dtype | None = None, act: str = SWIGLU
    ) -> Layer:
        made = {
            number: (
                random_weight(format_of(form), INNER, HIDDEN, 3 * number),
                random_weight(format_of(form), INNER, HIDDEN, 3 * number + 1),
                random_weight(format_of(down), HIDDEN, INNER, 3 * number + 2),
            )
            for number in ids
        }
        weights = {number: (g[0], u[0], d[0]) for number, (g, u, d) in made.items()}
        values = {number: (g[1], u[1], d[1]) for number, (g, u, d) in made.items()}
        first = 0 if has_gate(act) else 1
        sizes = [] if bias is None else [INNER, INNER, HIDDEN][first:]
        biases = {
            number: tuple(torch.randn(size, generator=seeded).to(bias) for size in sizes)
            for number in ids
            for seeded in [torch.Generator().manual_seed(number)]
        }
        held = Experts.of((number, weights[number][first:], biases[number]) for number in ids)
        return Layer(held, weights, values, biases, act)


@dataclass(frozen=True)
class Routed:
    """A call: rows, and the experts chosen for each; the first one of token 0 is none."""

    x: torch.Tensor
    ids: torch.Tensor
    routing: torch.Tensor
    slots: torch.Tensor
    edges: torch.Tensor

    @staticmethod
    def of(tokens: int) -> Routed:
        seeded = torch.Generator().manual_seed(tokens)
        chosen = [torch.randperm(ALL, generator=seeded)[:TOP_K] for _ in range(tokens)]
        ids = torch.stack(chosen)
        ids[0, 0] = -1
        found, slots = ids.flatten().sort(stable=True)
        edges = torch.searchsorted(found, torch.arange(ALL + 1))
        routing = torch.rand(tokens * TOP_K, generator=seeded)
        return Routed(random_x(tokens, HIDDEN, tokens) * 0.1, ids, routing, slots, edges)

    def added(self, y: torch.Tensor, layer: Layer) -> torch.Tensor:
        """f64 y, and what the layer's experts add."""
        total = y.double()
        for token, rank in torch.cartesian_prod(*map(torch.arange, self.ids.shape)).tolist():
            if (number := int(self.ids[token, rank])) not in layer.values:
                continue
            gate, up, down = layer.values[number]
            x = self.x[token].double()
            share = self.routing[token * TOP_K + rank].double()
            products = {"gate": gate @ x, "up": up @ x}
            *into, last = layer.biases[number] or (None,)
            for name, bias in zip(reversed(products), reversed(into), strict=False):
                products[name] = products[name] + bias.double()
            act = activated(layer.act, *products.values(), share).to(torch.bfloat16).double()
            product = down @ act if last is None else down @ act + last.double()
            total[token] += product if weighs(layer.act) else share * product
        return total

    def run(self, layer: Layer, work: Workspace, y: torch.Tensor, adds: bool,
            whole: torch.dtype = torch.int64, **options: Any) -> torch.Tensor:  # fmt: skip
        """y after the launches."""
        experts(
            self.x, self.slots.to(whole), self.edges.to(whole), self.routing, layer.held, work, y,
            top_k=TOP_K, adds=adds, act=layer.act, **options,
        )  # fmt: skip
        return y


@pytest.mark.few(1)
@pytest.mark.parametrize("adds", [False, True])
def test_few_tokens(adds: bool, work: Workspace) -> None:
    layer, call = Layer.of("fp8", "int4", [0, 3, 5]), Routed.of(3)
    before = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    exact = call.added(before if adds else torch.zeros(3, HIDDEN), layer)
    found = call.run(layer, work, before.clone(), adds)
    assert error(found, exact) < BOUND
    assert not work.counters.any()
    assert torch.equal(call.run(layer, work, before.clone(), adds, torch.int32), found)


@pytest.mark.parametrize("tokens", [2, pytest.param(19, marks=pytest.mark.slow)])
def test_zeros_and_scales_of_scales(tokens: int, work: Workspace) -> None:
    layer, call = Layer.of("int4-zero", "nvfp4", [0, 4]), Routed.of(tokens)
    exact = call.added(torch.zeros(tokens, HIDDEN), layer)
    assert error(call.run(layer, work, torch.zeros(tokens, HIDDEN), adds=False), exact) < BOUND


@pytest.mark.few(2)
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("act", ["silu(gate * weight) * (up * weight)", SWIGLU, "square(relu(up))"])
@pytest.mark.parametrize("tokens", [3, 21])
def test_biases_and_weights_on_the_input(
    tokens: int, act: str, bias: torch.dtype | None, work: Workspace
) -> None:
    layer, call = Layer.of("bf16", "bf16", [0, 3, 5], bias, act), Routed.of(tokens)
    exact = call.added(torch.zeros(tokens, HIDDEN), layer)
    # one rounding to bf16 on the way may fall to either side
    assert error(call.run(layer, work, torch.zeros(tokens, HIDDEN), False), exact) < 1e-4


@pytest.mark.slow
def test_many_tokens_in_ranges(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "LEAST_SPAN", 7)
    layer, call = Layer.of("int4", "fp8", [1, 5]), Routed.of(21)
    exact = call.added(torch.zeros(21, HIDDEN), layer)
    found = call.run(layer, work, torch.full((21, HIDDEN), 9.0), adds=False)
    assert error(found, exact) < BOUND
    # activations of a third of the tokens at once: the same sums
    parted = call.run(layer, work, torch.zeros(21, HIDDEN), True, torch.int32, budget=1)
    assert torch.equal(parted, found)


def test_tiles_of_one_expert_follow_each_other(
    work: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More slots of an expert than a tile has, and experts without any."""
    layer, call = Layer.of("bf16", "bf16", [0, 1, 4]), Routed.of(40)
    call.ids[:, 1:] = -1
    call.ids[:, 0] = torch.where(torch.arange(40) % 9 == 0, 4, 1)
    ids, slots = call.ids.flatten().sort(stable=True)
    call.slots.copy_(slots)
    call.edges.copy_(torch.searchsorted(ids, torch.arange(ALL + 1)))
    found = call.run(layer, work, torch.zeros(40, HIDDEN), adds=False)
    assert error(found, call.added(torch.zeros(40, HIDDEN), layer)) < BOUND


def test_x_and_activations_as_two_fp8_numbers(work: Workspace) -> None:
    layer, call = Layer.of("fp8", "fp8", [0, 4]), Routed.of(19)
    exact = call.added(torch.zeros(19, HIDDEN), layer)
    found = call.run(layer, work, torch.zeros(19, HIDDEN), adds=False, eights=True)
    # what is far below a block's largest loses bits
    assert error(found, exact) < 1e-4
