"""Builds the steps of one phase from the lowered graph, and lays its buffers out; used by the emit
pass alone.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import torch.fx

from hmc.codegen.spec import KernelSpec
from hmc.errors import PassFailedError
from hmc.graph import NodeMeta, meta
from hmc.passes.context import Context
from hmc.passes.graph.fuse import feeds_output
from hmc.passes.graph.lower import kernel_key
from hmc.plan import DTYPE_BYTES, Buffer, Operand, Phase, Step
from hmc.plan.verify import EXTERNAL

_ALIGN = 64

Operands = dict[str, Operand]


@dataclass
class _Life:
    """A buffer and the positions of its first and last use."""

    dtype: str
    width: int
    external: bool = False
    first: int = -1
    last: int = -1

    @property
    def bytes(self) -> int:
        return -(-self.width * DTYPE_BYTES[self.dtype] // _ALIGN) * _ALIGN


@dataclass
class PhaseBuilder:
    """One use: `build` walks the graph and returns the phase. `constants` is shared by all phases
    of the plan.
    """

    name: str
    context: Context
    constants: dict[str, tuple[float, ...]]
    _steps: list[Step] = field(default_factory=list)
    _lives: dict[str, _Life] = field(default_factory=dict)
    _values: dict[torch.fx.Node, tuple[Operand, ...]] = field(default_factory=dict)

    def build(self, graph: torch.fx.GraphModule, max_tokens: int) -> Phase:
        """The phase of a graph whose nodes carry their kernels; raises `PassFailedError` on what
        cannot be emitted.
        """
        self._external("rows", "i32", 1)
        for node in graph.graph.nodes:
            self._emit(node)
        offsets, total = self._layout()
        return Phase(
            name=self.name,
            max_tokens=max_tokens,
            activation_bytes=total,
            buffers=tuple(
                Buffer(name=name, dtype=life.dtype, width=life.width, offset=offsets[name])  # type: ignore[arg-type]
                for name, life in self._lives.items()
            ),
            steps=tuple(self._steps),
        )

    # -- one node ----------------------------------------------------------------------------------

    def _emit(self, node: torch.fx.Node) -> None:
        found = meta(node)
        match found.kind:
            case "input":
                self._values[node] = (self._external(node.name, "i32", 1),)
            case "output":
                pass
            case "item":
                self._values[node] = (self._item(node, found),)
            case "rotary":
                self._values[node] = (self._rotary(node, found),)
            case _:
                self._values[node] = self._general(node, found)

    def _general(self, node: torch.fx.Node, found: NodeMeta) -> tuple[Operand, ...]:
        roles = _INPUTS[found.kind]
        inputs: Operands = {}
        operands = [self._values[arg] for arg in node.args if isinstance(arg, torch.fx.Node)]
        for role, values in zip(roles, operands, strict=False):
            if role == "routing":
                inputs["ids"], inputs["routing"] = values
            else:
                inputs[role] = values[0]
        if found.kind == "norm" and feeds_output(node):
            inputs["x"] = self._gather(node, inputs["x"])
        if found.kind in ("attention", "mla"):
            inputs["positions"] = self._named("positions")
        outputs: Operands = {}
        is_logits = all(user.op == "output" for user in node.users)
        for role, dtype, width in _OUTPUTS[found.kind](found):
            name = "logits" if is_logits else f"{node.name}.{role}" if role != "y" else node.name
            outputs[role] = (
                self._external("logits", "f32", width)
                if is_logits
                else self._buffer(name, dtype, width)
            )
        self._step(_OPS.get(found.kind, found.kind), found, inputs, outputs)
        return tuple(outputs.values())

    def _gather(self, node: torch.fx.Node, x: Operand) -> Operand:
        spec = KernelSpec.of("gather_rows", self.context.isa, width=x.width)
        self.context.kernels[kernel_key(spec)] = spec
        gathered = self._buffer(f"{node.name}.rows", "f32", x.width)
        plain = NodeMeta(
            "gather_rows", -1, x.width, "f32", kernels=((self.name, kernel_key(spec)),)
        )
        inputs = {"x": x, "rows": self._named("rows")}
        self._step("gather_rows", plain, inputs, {"y": gathered})
        return gathered

    def _item(self, node: torch.fx.Node, found: NodeMeta) -> Operand:
        (source,) = node.all_input_nodes
        parts = self._values[source]
        if len(parts) > 1:
            return parts[int(found.attr("index"))]
        column, width = parts[0].column + found.attr("offset"), found.attr("width")
        return Operand(buffer=parts[0].buffer, column=column, width=width)

    def _rotary(self, node: torch.fx.Node, found: NodeMeta) -> Operand:
        source = node.args[0]
        assert isinstance(source, torch.fx.Node)
        if len(source.users) != 1 or meta(source).kind == "input":
            raise PassFailedError(
                f"{node.name}: rotary works in place, but its input has other readers"
            )
        x = self._values[source][0]
        inputs = {"x": x, "positions": self._named("positions")}
        self._step("rotary", found, inputs, {"x": x})
        return x

    def _step(self, op: str, found: NodeMeta, inputs: Operands, outputs: Operands) -> None:
        position = len(self._steps)
        for operand in (*inputs.values(), *outputs.values()):
            life = self._lives[operand.buffer]
            life.first = position if life.first < 0 else life.first
            life.last = position
        weight_bytes, flops = self._cost(found)
        self._steps.append(
            Step(
                id=position,
                op=op,
                layer=found.layer,
                resource="cpu",
                inputs=inputs,
                outputs=outputs,
                weights=_weight_names(found),
                attrs=self._attrs(found),
                kernels=tuple(key for phase, key in found.kernels if phase == self.name),
                weight_bytes=weight_bytes,
                flops=flops,
            )
        )

    def _attrs(self, found: NodeMeta) -> dict[str, int | float | str]:
        result: dict[str, int | float | str] = {}
        for name, value in found.attrs:
            if isinstance(value, tuple):
                result["rope"] = self._constant(value)
            else:
                result[name] = value
        if found.kind in ("linear", "gate_up"):
            result["n"], result["k"] = found.weights[0].shape
        elif found.kind == "experts":
            result["n"], result["k"] = found.weights[0].shape
            result.pop("intermediate")
        elif found.kind in ("norm", "add_norm"):
            result["width"] = found.width // found.attr("groups")
        elif found.kind in ("embedding", "add", "gather_rows"):
            result["width"] = found.width
        return result

    def _constant(self, values: tuple[float, ...]) -> str:
        for name, known in self.constants.items():
            if known == values:
                return name
        name = f"rope{len(self.constants)}"
        self.constants[name] = values
        return name

    def _cost(self, found: NodeMeta) -> tuple[int, int]:
        """(weight bytes, FLOPs) of one token; a multiply-add counts 2, embedding reads one row."""
        total = flops = 0
        for weight in found.weights:
            source = self.context.source(weight)[0]
            size = source.data.nbytes + (source.scale.nbytes if source.scale else 0)
            times = found.attr("top_k") if weight.experts else 1
            if found.kind == "embedding":
                size //= weight.shape[0]
            total += times * size
            flops += (
                times * 2 * prod(weight.shape) if weight.linear or found.kind == "linear" else 0
            )
        return total, flops

    # -- buffers -----------------------------------------------------------------------------------

    def _buffer(self, name: str, dtype: str, width: int) -> Operand:
        self._lives[name] = _Life(dtype, width)
        return Operand(buffer=name, width=width)

    def _external(self, name: str, dtype: str, width: int) -> Operand:
        self._lives[name] = _Life(dtype, width, external=True)
        return Operand(buffer=name, width=width)

    def _named(self, name: str) -> Operand:
        return Operand(buffer=name, width=self._lives[name].width)

    def _layout(self) -> tuple[dict[str, int], int]:
        """Offsets in bytes a token, and their total: largest buffers first, each as low as its life
        allows.
        """
        offsets = {name: EXTERNAL for name, life in self._lives.items() if life.external}
        placed: list[tuple[int, int, _Life]] = []
        inside = [(name, life) for name, life in self._lives.items() if not life.external]
        for name, life in sorted(inside, key=lambda item: (-item[1].bytes, item[1].first, item[0])):
            offset = 0
            for start, stop, other in placed:
                apart = life.last < other.first or other.last < life.first
                if not apart and offset < stop and start < offset + life.bytes:
                    offset = stop
            offsets[name] = offset
            insort(placed, (offset, offset + life.bytes, life), key=lambda item: item[0])
        return offsets, max((stop for _, stop, _ in placed), default=0)


def _weight_names(found: NodeMeta) -> dict[str, str]:
    if any(weight.experts for weight in found.weights):
        return {"experts": f"layer:{found.layer}"}
    return {weight.role: weight.name for weight in found.weights}


_OPS = {"embedding": "embed"}

_INPUTS: dict[str, tuple[str, ...]] = {
    "embedding": ("ids",),
    "norm": ("x",),
    "add": ("h", "d0", "d1"),
    "add_norm": ("h", "d0", "d1"),
    "linear": ("x",),
    "gate_up": ("x",),
    "attention": ("q", "k", "v"),
    "mla": ("q", "latent", "k_rope"),
    "route": ("logits",),
    "experts": ("x", "routing"),
}

_OUTPUTS: dict[str, Callable[[NodeMeta], list[tuple[str, str, int]]]] = {
    "embedding": lambda m: [("y", "f32", m.width)],
    "norm": lambda m: [("y", m.dtype, m.width)],
    "add": lambda m: [("y", "f32", m.width)],
    "add_norm": lambda m: [("h_out", "f32", m.width), ("y", "bf16", m.width)],
    "linear": lambda m: [("y", "f32", m.width)],
    "gate_up": lambda m: [("y", "bf16", m.width)],
    "attention": lambda m: [("y", "bf16", m.width)],
    "mla": lambda m: [("y", "bf16", m.width)],
    "route": lambda m: [("ids", "i32", m.width), ("routing", "f32", m.width)],
    "experts": lambda m: [("y", "f32", m.width)],
}
