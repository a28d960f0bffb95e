"""The default device op: an op's reference (hmc/blocks/reference.py) on the device's tensors; hides
where the rows of a call and the states of its sequences lie.

Rows of an op without states do not depend on each other, and are done in blocks that keep to
`scratch.BYTES`. Where there are states, a call of one sequence gives the reference S = 1 sequence
of T tokens, one of several sequences S of one token each. States a sequence are those of its slot,
on the home GPU.
"""

from __future__ import annotations

from hmc.blocks.reference import REFERENCES, Tensors
from hmc.errors import UnsupportedError
from hmc.ops import op_of
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.base import Bound, Work
from hmc.runtime.device_ops.shares import Call

_TEMPORARIES = 6
"""Results that a reference is taken to have in hand at once."""


def by_reference(bound: Bound, step: Step) -> Work:
    """A step of any op that has a reference; `UnsupportedError` where it has none, or keeps states
    in pages. Inputs that the engine gives (positions) are no operands of a reference.
    """
    op, kept = op_of(step.op), op_of(step.op).states(step.attrs)
    if step.op not in REFERENCES or op.pages(step.attrs):
        raise UnsupportedError(f"op {step.op} runs on no device: no reference computes it there")
    reference, share, device = REFERENCES[step.op], bound.share(step), bound.device(step)
    inputs = {
        role.name: bound.tensor(step.inputs[role.name])
        for role in op.graph_inputs
        if role.name in step.inputs
    }
    outputs = {role: bound.tensor(operand) for role, operand in step.outputs.items()}
    states = {state.name: bound.cache(step.layer, state.name) for state in kept}

    def weights() -> Tensors:
        found = {}
        for role in step.weights:
            about = op.weight(role)
            if about is not None and about.matmul:
                matrix = bound.matrix(step, role)
                found[role] = matrix.rows(0, matrix.shape[0])
            elif (vector := bound.vector(step, role)) is not None:
                found[role] = vector
        return found

    wide = [tensor.shape[1] for tensor in (*inputs.values(), *outputs.values())]
    row = 4 * (sum(wide) + _TEMPORARIES * max(wide))

    def block(part: slice, given: Tensors) -> None:
        rows = {role: tensor[None, part] for role, tensor in inputs.items()}
        made, _ = reference(step.attrs, rows, given, {})
        for role, tensor in outputs.items():
            tensor[part].copy_(made[role][0])

    def by_row(call: Call) -> None:
        given = weights()
        for part in scratch.blocks(0, call.count(share), row):
            block(part, given)

    def work(call: Call) -> None:
        count = call.count(share)
        shape = (1, count) if call.single else (count, 1)
        given = {role: tensor[:count].reshape(*shape, -1) for role, tensor in inputs.items()}
        slots = call.rows[share, device].sequences if states else None
        if slots is not None and call.single:
            slots = slots[:1]
        before = {name: state[slots] for name, state in states.items()}
        made, after = reference(step.attrs, given, weights(), before)
        for role, tensor in outputs.items():
            tensor[:count].copy_(made[role].reshape(count, -1))
        for name, state in states.items():
            assert slots is not None
            state.index_copy_(0, slots, after[name].to(state.dtype))

    return work if states else by_row
