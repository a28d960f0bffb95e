"""Blocks every transformer has: embedding, norm, linear, the gated MLP; and the fused forms passes
put in their place.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hmc.blocks.base import Block, parameter, sibling
from hmc.blocks.pointwise import TORCH, activated
from hmc.checkpoint.views import View
from hmc.codegen.expr import SWIGLU, evaluate, parse
from hmc.graph import Attr, WeightSpec, attrs


class Embedding(Block):
    """Rows of a table: ids [T] -> [T, width]."""

    kind = "embed"

    def __init__(self, vocab: int, width: int) -> None:
        super().__init__()
        self.vocab, self.width = vocab, width
        self.table = parameter(vocab, width)

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        return (WeightSpec("table", f"{path}.weight", (self.vocab, self.width)),)

    def forward(self, ids: Tensor) -> Tensor:
        return functional.embedding(ids, self.table)


class RMSNorm(Block):
    """Root-mean-square norm of each of `groups` chunks of `size` elements, all with the same gamma
    [size].
    """

    kind = "norm"

    def __init__(self, size: int, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.size, self.eps, self.groups = size, eps, groups
        self.width = size * groups
        self.gamma = parameter(size)

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        return (WeightSpec("gamma", f"{path}.weight", (self.size,)),)

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        return attrs(width=self.size, eps=self.eps, groups=self.groups, out="f32")

    def forward(self, x: Tensor) -> Tensor:
        chunks = x.reshape(len(x), self.groups, self.size)
        power = chunks.square().mean(-1, keepdim=True)
        normed = chunks * (power + self.eps).rsqrt()
        return (self.gamma * normed).flatten(-2)


class Linear(Block):
    """y = x W^T (+ bias), W [width, inputs] as stored.

    `tied` names the checkpoint tensor that stands for W when it is not the block's own (an output
    layer that shares the embedding table); such a table is no operand that a quantised checkpoint
    converts; nor is one that is `plain`. `within` names the tensor beside the block that holds W
    among others, and how.
    """

    kind = "linear"

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool = False,
        tied: str | None = None,
        within: tuple[str, View] | None = None,
        plain: bool = False,
    ) -> None:
        super().__init__()
        self.inputs, self.width, self.tied, self.within = inputs, outputs, tied, within
        self.plain = plain or tied is not None
        self.weight = parameter(outputs, inputs)
        self.bias = parameter(outputs) if bias else None

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        name, view = self.tied or f"{path}.weight", None
        if self.within is not None:
            name, view = sibling(path, self.within[0]), self.within[1]
        shape = self.width, self.inputs
        weight = WeightSpec("weight", name, shape, linear=not self.plain, view=view)
        if self.bias is None:
            return (weight,)
        return (weight, WeightSpec("bias", f"{path}.bias", (self.width,)))

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        return attrs(k=self.inputs, n=self.width)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class GroupedLinear(Block):
    """A matrix [outputs, inputs] for each of `groups` equal parts of a row: x [T, groups * inputs]
    -> [T, groups * outputs]. They lie one after the other in the block's one tensor.
    """

    kind = "grouped_linear"

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.groups, self.k, self.n, self.width = groups, inputs, outputs, groups * outputs
        for group in range(groups):
            self.register_parameter(f"weight{group}", parameter(outputs, inputs))

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        shape = self.n, self.k
        whole = self.groups * self.n, self.k
        return tuple(
            WeightSpec(
                f"weight{group}",
                f"{path}.weight",
                shape,
                linear=True,
                view=View(whole, group * self.n),
            )
            for group in range(self.groups)
        )

    def forward(self, x: Tensor) -> Tensor:
        weights = {spec.role: getattr(self, spec.role) for spec in self.weights("")}
        return grouped_linear(dict(self.attributes()), {"x": x}, weights, {})[0]["y"]


def grouped_linear(
    attrs: Mapping[str, Any],
    inputs: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    states: Mapping[str, Tensor],
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """The reference of the op: x [..., groups * k]."""
    parts = inputs["x"].float().chunk(int(attrs["groups"]), -1)
    made = [functional.linear(x, weights[f"weight{n}"].float()) for n, x in enumerate(parts)]
    return {"y": torch.cat(made, -1)}, states


class GatedMLP(nn.Module):
    """down(act(gate(x), up(x))) with the parameter names of the Llama line, and a `bias` on all
    three or on none. `act` is an expression of `gate` and `up` (hmc/models/activations.py); without
    one it is SwiGLU, or what the model has.
    """

    def __init__(
        self, hidden: int, intermediate: int, *, act: str = "", bias: bool = False
    ) -> None:
        super().__init__()
        self.act = act
        self.gate_proj = Linear(hidden, intermediate, bias=bias)
        self.up_proj = Linear(hidden, intermediate, bias=bias)
        self.down_proj = Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        product = cache(lambda name: self.get_submodule(f"{name}_proj")(x))
        hidden = evaluate(parse(self.act or SWIGLU), product, TORCH, float)
        return self.down_proj(hidden)  # type: ignore[no-any-return]


class MLP(nn.Module):
    """down(act(up(x))): an MLP without a gate, whose `act` is an expression of `up`; a `bias` on
    both matrices or on none.
    """

    def __init__(self, hidden: int, intermediate: int, act: str, *, bias: bool = False) -> None:
        super().__init__()
        self.act = act
        self.up_proj = Linear(hidden, intermediate, bias=bias)
        self.down_proj = Linear(intermediate, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        hidden = evaluate(parse(self.act), {"up": up}.__getitem__, TORCH, float)
        return self.down_proj(hidden)  # type: ignore[no-any-return]


class GateUp(Block):
    """Two linears of the same input and an activation `act`, an expression of `gate` and `up`, as
    one node; stands where the fuse pass found them.

    Weight roles `gate` and `up` are the two linears' weights, under their own checkpoint names,
    which the pass takes from the nodes it replaces; `gate_bias` and `up_bias` their biases, which
    both have or none.
    """

    kind = "gate_up"
    dtype = "bf16"

    def __init__(self, gate: Linear, up: Linear, act: str = SWIGLU) -> None:
        super().__init__()
        if (gate.bias is None) != (up.bias is None):
            raise ValueError("a linear with a bias and one without cannot be fused into gate_up")
        self.gate, self.up, self.act = gate, up, act
        self.width = gate.width

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        return attrs(k=self.gate.inputs, n=self.width, act=self.act)

    def forward(self, x: Tensor) -> Tensor:
        return activated(self.act, self.gate(x), self.up(x))


class AddNorm(Block):
    """(h + d0 (+ d1), its norm): residual and norm as one node, a pair read through item nodes.

    The result's first part is the sum in f32, the second the norm in bf16; gamma keeps the norm's
    checkpoint name.
    """

    kind = "add_norm"

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.norm, self.eps = norm, norm.eps
        self.width = norm.width

    def forward(self, h: Tensor, d0: Tensor, d1: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = h + d0 if d1 is None else h + (d0 + d1)
        return total, self.norm(total)
