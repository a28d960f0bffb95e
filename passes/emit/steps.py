"""The steps of a phase of the CPU alone, from the lowered graph; used by the emit pass alone."""

from __future__ import annotations

from math import prod

import torch.fx

from hmc.codegen.spec import KernelSpec
from hmc.errors import PassFailedError
from hmc.graph import PLAIN, NodeMeta, meta
from hmc.ops import OPS, Use
from hmc.passes.emit.builder import Schedule
from hmc.passes.emit.values import Part, Value
from hmc.passes.records import BLOCK, Target
from hmc.plan import Phase

Attribute = int | float | str

_GATHER = "gather_rows"
"""The op that picks rows for the head."""


class PhaseBuilder:
    """One use: `build` walks the graph and returns the phase. `constants` (by value) and `kernels`
    (by key) are shared by all phases of the plan, and filled.
    """

    def __init__(
        self,
        name: str,
        target: Target,
        constants: dict[tuple[float, ...], str],
        kernels: dict[str, KernelSpec],
    ) -> None:
        self._target, self._constants, self._kernels = target, constants, kernels
        self._schedule = Schedule(name)
        self._given = {"rows": Part.all(Value("rows", "i32", 1, external=True))}
        """The engine's own arrays by name."""
        self._values: dict[torch.fx.Node, tuple[Part, ...]] = {}

    def build(self, graph: torch.fx.GraphModule, max_tokens: int) -> Phase:
        """The phase of a graph whose nodes carry their kernels; raises `PassFailedError` on what
        cannot be emitted.
        """
        for node in graph.graph.nodes:
            found = meta(node)
            if found.kind == "input":
                given = Part.all(Value(node.name, "i32", 1, external=True))
                self._given[node.name] = given
                self._values[node] = (given,)
            elif found.kind == "item":
                self._values[node] = (self._item(node, found),)
            elif found.kind not in PLAIN:
                self._values[node] = self._computed(node, found)
        engine = [part.value for part in self._given.values()]
        return self._schedule.finish_alone(max_tokens, engine)

    def _computed(self, node: torch.fx.Node, found: NodeMeta) -> tuple[Part, ...]:
        """The step of a node, its operands named by the op's row; the results."""
        row, attrs = OPS[found.kind], self._attrs(found)
        read = [arg for arg in node.args if isinstance(arg, torch.fx.Node)]
        values = [part for each in read for part in self._values[each]]
        inputs = {role.name: part for role, part in zip(row.read(attrs), values, strict=False)}
        if found.section == "head" and not any(meta(each).section == "head" for each in read):
            first = row.read(attrs)[0].name
            inputs[first] = self._gather(node, inputs[first])
        inputs |= {role.name: self._given[role.given] for role in row.inputs if role.given}
        is_logits = any(user.op == "output" for user in node.users)
        outputs: dict[str, Part] = {}
        for role in row.outputs:
            if role.in_place:
                self._alone(node, inputs[role.in_place])
                outputs[role.name] = inputs[role.in_place]
                continue
            (dtype,) = role.dtypes(attrs)
            assert role.width is not None
            width = role.width(attrs)
            name = f"{node.name}.{role.name}" if role.name != "y" else node.name
            value = Value("logits" if is_logits else name, dtype, width, external=is_logits)  # type: ignore[arg-type]
            outputs[role.name] = Part.all(value)
        self._step(found, attrs, inputs, outputs)
        return tuple(outputs.values())

    def _gather(self, node: torch.fx.Node, x: Part) -> Part:
        """The rows whose logits are wanted: all that the head works on."""
        attrs: dict[str, Attribute] = {"width": x.width}
        specs = OPS[_GATHER].kernels(attrs, {}, Use(self._target.isa, 0, BLOCK))
        gathered = Part.all(Value(f"{node.name}.rows", "f32", x.width))
        kernels = tuple((self._schedule.name, spec) for spec in specs)
        plain = NodeMeta(_GATHER, -1, x.width, "f32", "head", kernels=kernels)
        inputs = {"x": x, "rows": self._given["rows"]}
        self._step(plain, attrs, inputs, {"y": gathered})
        return gathered

    def _item(self, node: torch.fx.Node, found: NodeMeta) -> Part:
        (source,) = node.all_input_nodes
        parts = self._values[source]
        if len(parts) > 1:
            return parts[int(found.attr("index"))]
        column, width = parts[0].column + found.attr("offset"), found.attr("width")
        return Part(parts[0].value, column, width)

    def _alone(self, node: torch.fx.Node, part: Part) -> None:
        """Refuse a step that works in place on what others read too."""
        for source in node.all_input_nodes:
            if part in self._values[source] and (
                len(source.users) != 1 or meta(source).kind == "input"
            ):
                raise PassFailedError(
                    f"{node.name}: {meta(node).kind} works in place, but its input has other"
                    " readers"
                )

    def _step(
        self,
        found: NodeMeta,
        attrs: dict[str, Attribute],
        inputs: dict[str, Part],
        outputs: dict[str, Part],
    ) -> None:
        weight_bytes, flops = self._cost(found)
        key, name = OPS[found.kind].key, self._schedule.name
        specs = [spec for phase, spec in found.kernels if phase == name]
        self._kernels.update((key(spec), spec) for spec in specs)
        self._schedule.add(
            found.kind,
            "cpu",
            inputs,
            outputs,
            layer=found.layer,
            section=found.section,
            weights=_weight_names(found),
            attrs=attrs,
            kernels=tuple(map(key, specs)),
            weight_bytes=weight_bytes,
            flops=flops,
        )

    def _attrs(self, found: NodeMeta) -> dict[str, Attribute]:
        return {
            name: self._constants.setdefault(value, f"rope{len(self._constants)}")
            if isinstance(value, tuple)
            else value
            for name, value in found.attrs
        }

    def _cost(self, found: NodeMeta) -> tuple[int, int]:
        """(weight bytes, FLOPs) of one token; a multiply-add counts 2. A table is read a row."""
        row = OPS[found.kind]
        total = flops = 0
        for weight in found.weights:
            role = row.weight(weight.role)
            assert role is not None
            size = self._target.source(weight)[0].nbytes
            times = found.attr("top_k") if role.expert else 1
            total += times * (size // weight.shape[0] if row.where == "host" else size)
            flops += times * 2 * prod(weight.shape) if role.matmul else 0
        return total, flops


def _weight_names(found: NodeMeta) -> dict[str, str]:
    if any(weight.experts for weight in found.weights):
        return {"experts": f"layer:{found.layer}"}
    return {weight.role: weight.key for weight in found.weights}
