"""Builds the steps of one phase from the lowered graph, and lays its buffers out; used by the emit
pass alone.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from math import prod

import torch.fx

from hmc.codegen.spec import KernelSpec
from hmc.errors import PassFailedError
from hmc.graph import PLAIN, NodeMeta, meta
from hmc.ops import OPS, Use
from hmc.passes.records import BLOCK, Target
from hmc.plan import DTYPE_BYTES, Buffer, Operand, Phase, Step
from hmc.plan.verify import EXTERNAL

_ALIGN = 64

Operands = dict[str, Operand]
Attribute = int | float | str

_GATHER = "gather_rows"
"""The op that picks rows for the head."""


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
    """One use: `build` walks the graph and returns the phase. `constants` and `kernels` (by key)
    are shared by all phases of the plan, and filled.
    """

    name: str
    target: Target
    constants: dict[str, tuple[float, ...]]
    kernels: dict[str, KernelSpec]
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
        if found.kind == "input":
            self._values[node] = (self._external(node.name, "i32", 1),)
        elif found.kind == "item":
            self._values[node] = (self._item(node, found),)
        elif found.kind not in PLAIN:
            self._values[node] = self._computed(node, found)

    def _computed(self, node: torch.fx.Node, found: NodeMeta) -> tuple[Operand, ...]:
        """The step of a node, its operands named by the op's row; the results."""
        row, attrs = OPS[found.kind], self._attrs(found)
        read = [arg for arg in node.args if isinstance(arg, torch.fx.Node)]
        values = [operand for each in read for operand in self._values[each]]
        inputs: Operands = {
            role.name: operand for role, operand in zip(row.read(attrs), values, strict=False)
        }
        if found.section == "head" and not any(meta(each).section == "head" for each in read):
            first = row.read(attrs)[0].name
            inputs[first] = self._gather(node, inputs[first])
        inputs |= {role.name: self._named(role.given) for role in row.inputs if role.given}
        is_logits = any(user.op == "output" for user in node.users)
        outputs: Operands = {}
        for role in row.outputs:
            if role.in_place:
                self._alone(node, inputs[role.in_place])
                outputs[role.name] = inputs[role.in_place]
                continue
            (dtype,) = role.dtypes(attrs)
            assert role.width is not None
            width = role.width(attrs)
            name = f"{node.name}.{role.name}" if role.name != "y" else node.name
            outputs[role.name] = (
                self._external("logits", dtype, width)
                if is_logits
                else self._buffer(name, dtype, width)
            )
        self._step(found, attrs, inputs, outputs)
        return tuple(outputs.values())

    def _gather(self, node: torch.fx.Node, x: Operand) -> Operand:
        """The rows whose logits are wanted: all that the head works on."""
        attrs: dict[str, Attribute] = {"width": x.width}
        specs = OPS[_GATHER].kernels(attrs, {}, Use(self.target.isa, 0, BLOCK))
        gathered = self._buffer(f"{node.name}.rows", "f32", x.width)
        kernels = tuple((self.name, spec) for spec in specs)
        plain = NodeMeta(_GATHER, -1, x.width, "f32", "head", kernels=kernels)
        inputs = {"x": x, "rows": self._named("rows")}
        self._step(plain, attrs, inputs, {"y": gathered})
        return gathered

    def _item(self, node: torch.fx.Node, found: NodeMeta) -> Operand:
        (source,) = node.all_input_nodes
        parts = self._values[source]
        if len(parts) > 1:
            return parts[int(found.attr("index"))]
        column, width = parts[0].column + found.attr("offset"), found.attr("width")
        return Operand(buffer=parts[0].buffer, column=column, width=width)

    def _alone(self, node: torch.fx.Node, operand: Operand) -> None:
        """Refuse a step that works in place on what others read too."""
        for source in node.all_input_nodes:
            if operand in self._values[source] and (
                len(source.users) != 1 or meta(source).kind == "input"
            ):
                raise PassFailedError(
                    f"{node.name}: {meta(node).kind} works in place, but its input has other"
                    " readers"
                )

    def _step(
        self, found: NodeMeta, attrs: dict[str, Attribute], inputs: Operands, outputs: Operands
    ) -> None:
        position = len(self._steps)
        for operand in (*inputs.values(), *outputs.values()):
            life = self._lives[operand.buffer]
            life.first = position if life.first < 0 else life.first
            life.last = position
        weight_bytes, flops = self._cost(found)
        row, specs = OPS[found.kind], [s for phase, s in found.kernels if phase == self.name]
        self.kernels.update((row.key(spec), spec) for spec in specs)
        self._steps.append(
            Step(
                id=position,
                op=found.kind,
                layer=found.layer,
                section=found.section,
                resource="cpu",
                inputs=inputs,
                outputs=outputs,
                weights=_weight_names(found),
                attrs=attrs,
                kernels=tuple(map(row.key, specs)),
                weight_bytes=weight_bytes,
                flops=flops,
            )
        )

    def _attrs(self, found: NodeMeta) -> dict[str, Attribute]:
        return {
            name: self._constant(value) if isinstance(value, tuple) else value
            for name, value in found.attrs
        }

    def _constant(self, values: tuple[float, ...]) -> str:
        for name, known in self.constants.items():
            if known == values:
                return name
        name = f"rope{len(self.constants)}"
        self.constants[name] = values
        return name

    def _cost(self, found: NodeMeta) -> tuple[int, int]:
        """(weight bytes, FLOPs) of one token; a multiply-add counts 2. A table is read a row."""
        row = OPS[found.kind]
        total = flops = 0
        for weight in found.weights:
            role = row.weight(weight.role)
            assert role is not None
            size = self.target.source(weight)[0].nbytes
            times = found.attr("top_k") if role.expert else 1
            total += times * (size // weight.shape[0] if row.where == "host" else size)
            flops += times * 2 * prod(weight.shape) if role.matmul else 0
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
    return {weight.role: weight.key for weight in found.weights}
