"""What hmc knows of a traced graph: one frozen `NodeMeta` a node, in `node.meta["hmc"]`.

The graph itself is a plain `torch.fx.GraphModule`. Passes read and *replace* the meta of a node;
they never mutate it and never look at model families: all they reason about is the node kinds
below.

A node's kind is an op of hmc/ops, whose row says what inputs, attributes and weights it has; or one
of `PLAIN`:

    input    token ids [T], positions [T]
    item     part `index` of a value of several outputs, or columns [offset, offset + width) of rows
    vector   a weight as it is, read by arithmetic of a model file (`pointwise` nodes) alone
    mask     a comparison, part of the arithmetic that chooses by it
    output   the logits

Arguments of an fx node are values; one that has several outputs (`route`) stands for all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

from hmc.checkpoint.views import View
from hmc.codegen.spec import KernelSpec

DType = Literal["f32", "bf16", "i32"]
Attr = int | float | str | tuple[float, ...]
Section = Literal["", "attention", "mlp", "head"]

PLAIN = frozenset(("input", "item", "vector", "mask", "output"))
"""Kinds that compute nothing by themselves."""


@dataclass(frozen=True)
class WeightSpec:
    """A weight a node reads: `name` as in the checkpoint, `shape` as stored (of one expert when
    `experts` > 0).

    For routed experts `name` holds the placeholder `{e}` and `experts` their number. `linear` says
    that the weight is one that a quantised checkpoint may store in a low-bit format (a matmul
    operand, not a norm or a table). With a `view` it is a part of the tensor of that name: some
    rows, or an expert of a stack (then there is no placeholder). `dtype` is what checkpoints store
    it in, whatever the others ("": as these are).
    """

    role: str
    name: str
    shape: tuple[int, ...]
    linear: bool = False
    experts: int = 0
    view: View | None = None
    dtype: str = ""

    @property
    def key(self) -> str:
        """What a plan calls it: its tensor's name, with the rows where it is a part of it."""
        return self.name if self.view is None else self.view.of(self.name, self.shape[0])


@dataclass(frozen=True)
class NodeMeta:
    """Everything hmc knows of one node; the fields from `formats` on are decisions of passes, empty
    after tracing.

    `width` is elements per token of the result (its first part for tuples), `layer` -1 outside the
    layers, `section` the half of a layer it belongs to, or the head behind all. `attrs` are sorted
    (name, value) pairs: those of the kind's row. `kernels` are (phase, spec) in launch order.
    """

    kind: str
    layer: int
    width: int
    dtype: DType
    section: Section = ""
    weights: tuple[WeightSpec, ...] = ()
    attrs: tuple[tuple[str, Attr], ...] = ()
    formats: tuple[tuple[str, str], ...] = ()
    kernels: tuple[tuple[str, KernelSpec], ...] = ()

    def attr(self, name: str) -> Any:
        """An attribute of the node's kind; `KeyError` when the kind has none of that name."""
        for key, value in self.attrs:
            if key == name:
                return value
        raise KeyError(f"a {self.kind} node has no attribute {name}")

    def with_(self, **changes: Any) -> NodeMeta:
        """A copy with some fields replaced."""
        return replace(self, **changes)


def attrs(**values: Attr) -> tuple[tuple[str, Attr], ...]:
    """Attributes in canonical order."""
    return tuple(sorted(values.items()))


def meta(node: Any) -> NodeMeta:
    """The `NodeMeta` of an fx node; `KeyError` when it was never traced by hmc."""
    return cast(NodeMeta, node.meta["hmc"])
