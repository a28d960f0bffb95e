"""The default device op: an op's reference (hmc/blocks/reference.py) on the device's tensors; hides
where the rows of a call and the states of its sequences lie.

A call is done in blocks of rows that keep to `scratch.BYTES`. A call of one sequence gives the
reference S = 1 sequence of T tokens at a time, and states go from block to block; one of several
sequences gives S of one token each. States a sequence are those of its slot, on the home GPU.
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
    held = sum(state.shape[1] for state in states.values())

    def work(call: Call) -> None:
        given, single = weights(), call.single or not states
        slots = call.rows[share, device].sequences if states else None
        size = row if single else row + 4 * _TEMPORARIES * held
        for part in scratch.blocks(0, call.count(share), size):
            rows = {
                role: tensor[None, part] if single else tensor[part, None]
                for role, tensor in inputs.items()
            }
            own = None if slots is None else slots[:1] if single else slots[part]
            before = {name: state[own] for name, state in states.items()}
            made, after = reference(step.attrs, rows, given, before)
            for role, tensor in outputs.items():
                tensor[part].copy_(made[role].flatten(0, 1))
            for name, state in states.items():
                assert own is not None
                state.index_copy_(0, own, after[name].to(state.dtype))

    return work
