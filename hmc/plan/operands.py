"""Checks the operands of a phase's steps, and which rows of a call they hold.

buffers     lie inside their arena; some step writes all columns of each
operands    every role that must be there and no other; dtype, width and columns are the role's, on
            a device that the step's resource reads or writes; rows without a gap where a kernel has
            no stride; in place where the role says so, and nowhere else
externals   the engine's own arrays where a role is given one, and nowhere else
shares      a step reads what was written for the rows it works on: of a rank, of a lane, of all
"""

from __future__ import annotations

from collections.abc import Mapping

from hmc.errors import VerifyError
from hmc.ops import Op, Role
from hmc.plan.about import About, Expected
from hmc.plan.base import DTYPE_BYTES
from hmc.plan.model import EXTERNAL, Buffer, Operand, Phase, Plan, Step

ALIGN = 64
"""Bytes that buffers of an arena are aligned to."""
LOGITS = "logits"
_GIVEN = ("ids", "positions", "rows")

Share = tuple[str, int]
"""The rows of a call a step works on: ("all", 0), ("rank", r), ("lane", l) or ("wanted", 0)."""
_ALL, _WANTED = ("all", 0), ("wanted", 0)


class Walk:
    """The steps of a phase in order: buffers written so far, for which rows."""

    def __init__(self, plan: Plan, phase: Phase) -> None:
        """`VerifyError` where a buffer of the phase does not lie inside its arena."""
        self._phase, self._buffers = phase, _buffers_of(plan, phase)
        self._written: dict[str, Share] = {}
        self._whole: set[str] = set()
        self._picked = False
        self._devices = {name: _devices(name) for name in {step.resource for step in phase.steps}}

    def check(self, step: Step, about: About) -> None:
        """A step's operands, and whose rows they are."""
        row = about.row
        for least, operands in zip(about.least, (step.inputs, step.outputs), strict=True):
            if not least <= operands.keys():
                raise VerifyError(f"it has no {min(least - operands.keys())}")
        share = self._share(step, row)
        reads, writes = self._devices[step.resource]
        read = []
        for name, operand in step.inputs.items():
            expected = about.expected(step, name, output=False)
            buffer = self._checked(name, operand, expected)
            read.append(operand.buffer)
            if buffer.offset == EXTERNAL:
                self._check_given(step, about, name, expected.role, buffer)
                continue
            if expected.role.given or row.where == "host":
                raise VerifyError(f"{name} is not the engine's own array")
            if buffer.device not in reads and reads:
                raise VerifyError(
                    f"{name} is on {buffer.device}, which {step.resource} cannot read"
                )
            wrote = self._written.get(operand.buffer, share)
            if wrote != share and not self._may_read(row, expected.role, wrote):
                raise VerifyError(f"{name} holds rows of {wrote}, it works on {share}")
        for name, operand in step.outputs.items():
            expected = about.expected(step, name, output=True)
            buffer = self._checked(name, operand, expected)
            external = buffer.offset == EXTERNAL and buffer.device == "host"
            mine = buffer.name == LOGITS and not (about.native and len(self._devices) > 1)
            if external and not mine:
                raise VerifyError(f"{name} is the engine's {buffer.name}")
            if "screen" in step.attrs and not external:
                raise VerifyError(f"it is screened, and {name} is no logits of the engine's")
            if buffer.device not in writes and writes:
                raise VerifyError(
                    f"{name} is on {buffer.device}, which {step.resource} cannot write"
                )
            if expected.role.in_place:
                source = step.inputs[expected.role.in_place]
                if (source.buffer, source.column, source.width) != (
                    *(operand.buffer, operand.column, operand.width),
                ):
                    raise VerifyError(f"{name} is not in place of {expected.role.in_place}")
            elif operand.buffer in read:
                raise VerifyError(f"{name} overwrites what it reads")
            if operand.width == buffer.width:
                self._whole.add(operand.buffer)
            self._written[operand.buffer] = self._outcome(row, expected.role, name, share)
        if row.loose and step.outputs:
            if not step.inputs:
                raise VerifyError("it writes what it did not read")
            _check_alike(step, self._buffers)
            if row.many:
                self._check_many(step, row)

    def finish(self) -> None:
        """Every buffer of the arenas was written in its whole width, and logits were."""
        for name, buffer in self._buffers.items():
            if name not in self._whole and not (
                buffer.offset == EXTERNAL and name != LOGITS and buffer.device == "host"
            ):
                raise VerifyError(
                    f"phase {self._phase.name}: no step writes all columns of buffer {name}"
                )

    def _checked(self, name: str, operand: Operand, expected: Expected) -> Buffer:
        """The buffer of an operand that is what its role expects."""
        buffer = self._buffers.get(operand.buffer)
        if buffer is None:
            raise VerifyError(f"{name} names buffer {operand.buffer}, which is not declared")
        if buffer.dtype not in expected.dtypes:
            raise VerifyError(f"{name} is {buffer.dtype}, not {' or '.join(expected.dtypes)}")
        if expected.width is not None and operand.width != expected.width:
            raise VerifyError(f"{name} is {operand.width} wide, not {expected.width}")
        if (
            operand.column < 0
            or operand.width < 1
            or (operand.column + operand.width > buffer.width)
        ):
            raise VerifyError(
                f"{name} reads columns beyond buffer {buffer.name} ({buffer.width} wide)"
            )
        if expected.packed and operand.width != buffer.width:
            raise VerifyError(f"{name} is not all columns of buffer {buffer.name}")
        return buffer

    def _check_given(self, step: Step, about: About, name: str, role: Role, buffer: Buffer) -> None:
        """An input that is the engine's own array."""
        if buffer.device != "host":
            if buffer.device not in self._devices[step.resource][0]:
                raise VerifyError(f"{name} is on {buffer.device}")
            return
        prefix, _, stem = buffer.name.rpartition(".")
        table = about.row.where == "host"
        if stem != (name if table else role.given) or (prefix and about.native and not table):
            raise VerifyError(f"{name} is the engine's {buffer.name}")

    def _share(self, step: Step, row: Op) -> Share:
        phase = self._phase
        if not 0 <= step.lane < phase.lanes or step.layer < -1:
            raise VerifyError(f"layer {step.layer} or lane {step.lane} is none of the phase")
        if "whole" in step.attrs and (phase.lanes == 1 or step.attrs["whole"] != 1):
            raise VerifyError("it works on all rows of a phase that has no lanes")
        if row.picks:
            self._picked = True
        if self._picked:
            return _WANTED
        if "ranks" in step.attrs:
            if step.attrs["ranks"] != phase.ranks or phase.ranks == 1:
                raise VerifyError(f"it is one of {step.attrs['ranks']} ranks of {phase.ranks}")
            rank = step.resource[3:] if step.resource != "cpu" else _rank(step)
            if not rank.isdecimal() or int(rank) >= phase.ranks:
                raise VerifyError(f"{step.resource} is no rank of the phase")
            return "rank", int(rank)
        if phase.lanes > 1 and "whole" not in step.attrs:
            return "lane", step.lane
        return _ALL

    @staticmethod
    def _may_read(row: Op, role: Role, wrote: Share) -> bool:
        """Whether a step reads rows that are not its own."""
        return row.picks or role.many or (role.rows == "all" and wrote == _ALL)

    def _outcome(self, row: Op, role: Role, name: str, share: Share) -> Share:
        """The rows that a written buffer holds."""
        if not role.many:
            return share
        if role.rows == "all":
            return _ALL
        number = int(name.removeprefix(role.name))
        return ("rank" if row.where == "link" else "lane"), number

    def _check_many(self, step: Step, row: Op) -> None:
        """As many numbered operands as there are ranks or lanes, each of its rank or lane."""
        count = self._phase.ranks if row.where == "link" else self._phase.lanes
        for roles, operands in ((row.inputs, step.inputs), (row.outputs, step.outputs)):
            for role in roles:
                if not role.many:
                    continue
                # of sums, only the ranks that have a part bring one
                wanted = len(operands) if role.rows == "all" and roles is row.inputs else count
                known = 0 < wanted == len(operands) <= count
                if not known or any(f"{role.name}{n}" not in operands for n in range(wanted)):
                    raise VerifyError(f"{role.name} are not one for each of {count}")
                kind = "rank" if row.where == "link" else "lane"
                for name, operand in operands.items():
                    number = int(name.removeprefix(role.name))
                    wrote = self._written.get(operand.buffer)
                    if wrote is None:
                        raise VerifyError(f"{name} is read before anything wrote it")
                    if wrote != ((kind, number) if role.rows == "tokens" else _ALL):
                        raise VerifyError(f"{name} holds rows of {wrote}")


def _buffers_of(plan: Plan, phase: Phase) -> dict[str, Buffer]:
    """The buffers of a phase by name, each known to lie inside its arena."""
    buffers = {buffer.name: buffer for buffer in phase.buffers}
    if len(buffers) != len(phase.buffers):
        raise VerifyError(f"phase {phase.name}: two buffers share a name")
    room = {"host": phase.activation_bytes, **phase.device_bytes}
    for buffer in phase.buffers:
        if buffer.offset == EXTERNAL:
            _check_external(plan, phase, buffer)
        elif (
            buffer.width < 1
            or buffer.offset < 0
            or buffer.offset % ALIGN
            or buffer.offset + buffer.width * DTYPE_BYTES[buffer.dtype] > room.get(buffer.device, 0)
        ):
            raise VerifyError(
                f"phase {phase.name}: buffer {buffer.name} leaves the activation arena"
            )
    if LOGITS not in buffers:
        raise VerifyError(f"phase {phase.name} has no buffer {LOGITS}")
    return buffers


def _check_external(plan: Plan, phase: Phase, buffer: Buffer) -> None:
    stem = buffer.name.rpartition(".")[2]
    if buffer.name == LOGITS or stem == "device":
        right = ("f32", plan.model.vocab, buffer.name == LOGITS)
    elif stem in _GIVEN:
        right = ("i32", 1, True)
    else:
        right = ("", 0, False)
    if (buffer.dtype, buffer.width, buffer.device == "host") != right:
        raise VerifyError(f"phase {phase.name}: the engine has no such array as {buffer.name}")


def _check_alike(step: Step, buffers: Mapping[str, Buffer]) -> None:
    """Operands whose width no attribute says: those of one name are alike, else all are."""
    if step.outputs.keys() & step.inputs.keys():
        if step.outputs.keys() != step.inputs.keys() or any(
            (operand.width, buffers[operand.buffer].dtype)
            != (step.inputs[name].width, buffers[step.inputs[name].buffer].dtype)
            for name, operand in step.outputs.items()
        ):
            raise VerifyError("it does not write what it reads")
    elif len({operand.width for operand in (*step.inputs.values(), *step.outputs.values())}) > 1:
        raise VerifyError("what it reads and writes differs in width")


def _rank(step: Step) -> str:
    """The CPU embeds for all ranks: its input tells for which."""
    name = next(iter(step.inputs.values())).buffer
    return name.partition(".")[0].removeprefix("r")


def _devices(resource: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Devices whose memory a resource reads and writes; none named: any."""
    if resource == "cpu":
        return ("host",), ("host",)
    kind, gpu = resource[:3], f"gpu{resource[3:]}"
    if kind == "gpu":
        return (gpu,), (gpu,)
    if kind == "h2d":
        return ("host", gpu), (gpu,)
    if kind == "d2h":
        return (gpu,), ("host",)
    return (), ()
