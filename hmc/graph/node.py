"""What hmc knows of a traced graph: one frozen `NodeMeta` a node, in `node.meta["hmc"]`.

The graph itself is a plain `torch.fx.GraphModule`. Passes read and *replace* the meta of a node;
they never mutate it and never look at model families: all they reason about is the node kinds
below.

Node kinds, their fx inputs in order, and their result (T tokens; `width` counts elements of one
token's row):

    input       token ids [T], positions [T]
    embedding   (ids) -> f32 [T, width]                                   weight: table
    norm        (x) -> bf16 or f32 [T, width]; `groups` chunks each       weight: gamma
    linear      (x) -> f32 [T, width]                                     weights: weight, bias?
    rotary      (x, positions) -> f32 [T, heads * head_dim]; may carry a fused per-head norm
    (weight: gamma) attention   (q, k, v) -> bf16 [T, heads * v_dim]; appends k, v to the layer's
    cache
    mla         (q, latent, k_rope) -> bf16 [T, heads * v_dim]; appends (latent, k_rope)   weight:
    kv_b
    route       (logits) -> ids i32 and routing weights f32, both [T, top_k], as one value  weight:
    bias?
    experts     (x, routing) -> f32 [T, width]                            weights: gate, up, down
    (one a expert)
    silu_mul    (gate, up) -> bf16 [T, width]
    gate_up     (x) -> bf16 [T, width]: two linears and silu_mul fused    weights: gate, up
    add         (h, d) -> f32 [T, width]
    add_norm    (h, d0[, d1]) -> (sum f32, norm bf16): fused residual and norm             weight:
    gamma
    item        (value) -> part `index` of a tuple, or columns [offset, offset + width) of rows
    output      (logits)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

DType = Literal["f32", "bf16", "i32"]
Attr = int | float | str | tuple[float, ...]

KINDS = frozenset(
    "input embedding norm linear rotary attention mla route experts silu_mul gate_up add add_norm"
    " item output".split()
)


@dataclass(frozen=True)
class WeightSpec:
    """A weight a node reads: `name` as in the checkpoint, `shape` as stored (of one expert when
    `experts` > 0).

    For routed experts `name` holds the placeholder `{e}` and `experts` their number. `linear` says
    that the weight is one that a quantised checkpoint may store in a low-bit format (a matmul
    operand, not a norm or a table).
    """

    role: str
    name: str
    shape: tuple[int, ...]
    linear: bool = False
    experts: int = 0


@dataclass(frozen=True)
class NodeMeta:
    """Everything hmc knows of one node; the fields from `formats` on are decisions of passes, empty
    after tracing.

    `width` is elements per token of the result (its first part for tuples), `layer` -1 outside the
    layers. `attrs` are sorted (name, value) pairs of the node's kind: sizes, eps, scale, scoring
    mode.
    """

    kind: str
    layer: int
    width: int
    dtype: DType
    weights: tuple[WeightSpec, ...] = ()
    attrs: tuple[tuple[str, Attr], ...] = ()
    formats: tuple[tuple[str, str], ...] = ()
    kernels: tuple[tuple[str, str], ...] = ()
    device: str = ""
    stream: str = ""
    lane: int = 0

    def attr(self, name: str) -> Any:
        """An attribute of the node's kind; `KeyError` when the kind has none of that name."""
        for key, value in self.attrs:
            if key == name:
                return value
        raise KeyError(f"a {self.kind} node has no attribute {name}")

    def weight(self, role: str) -> WeightSpec | None:
        """The weight in a role, or None."""
        return next((weight for weight in self.weights if weight.role == role), None)

    def with_(self, **changes: Any) -> NodeMeta:
        """A copy with some fields replaced."""
        return replace(self, **changes)


def attrs(**values: Attr) -> tuple[tuple[str, Attr], ...]:
    """Attributes in canonical order."""
    return tuple(sorted(values.items()))


def meta(node: Any) -> NodeMeta:
    """The `NodeMeta` of an fx node; `KeyError` when it was never traced by hmc."""
    return cast(NodeMeta, node.meta["hmc"])
