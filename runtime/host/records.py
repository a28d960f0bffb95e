"""What arguments of a kernel (codegen/arguments.py) are called tells what they are: an operand, its
stride, a weight, an attribute, the cache's block tables. `record` fills them in by name.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from types import MappingProxyType

from hmc.codegen.arguments import ARGS, Arg
from hmc.codegen.spec import KernelSpec
from hmc.ops import OPS
from hmc.plan import Operand, Step
from hmc.runtime.host.lowering import Lowering


def record(
    low: Lowering,
    step: Step,
    spec: KernelSpec,
    given: Mapping[str, int] = MappingProxyType({}),
    *,
    reads: Iterable[Operand | Hashable] | None = None,
    writes: Iterable[Operand | Hashable] | None = None,
    shared: tuple[int, int] = (0, 0),
) -> None:
    """Append a record of `spec`, with arguments as `given` and by name; it reads and writes all
    operands of the step where nothing else is said (see `Lowering.add`).
    """
    args = {
        arg.name: given[arg.name] if arg.name in given else _argument(low, step, arg)
        for arg in ARGS[spec.op]
        if arg.name != "tokens"
    }
    low.add(
        step,
        spec,
        reads=step.inputs.values() if reads is None else reads,
        writes=step.outputs.values() if writes is None else writes,
        shared=shared,
        **args,
    )


def _argument(low: Lowering, step: Step, arg: Arg) -> int | float:
    """What an argument's name says; 0 for operands and weights that a step lacks."""
    match arg.name:
        case "tables":
            return int(low.kv.table(step.layer).ctypes.data)
        case "table_stride":
            return int(low.kv.tables.shape[1])
        case "sequence":
            return int(low.arena.sequence.ctypes.data)
    name = arg.name.removesuffix("_stride")
    if operand := step.inputs.get(name) or step.outputs.get(name):
        place = low.arena.address if name == arg.name else low.arena.stride
        return place(operand)
    if arg.name in step.attrs:
        value = step.attrs[arg.name]
        return float(value) if arg.kind == "f32" else int(value)
    weight = step.weights.get(arg.name)
    role = OPS[step.op].weight(arg.name)
    if weight is None or role is None:
        return 0
    return low.tables.vector(weight) if role.vector else low.store.address(weight)
