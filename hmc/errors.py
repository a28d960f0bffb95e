"""Every error hmc raises on purpose, as one tree; the command line maps each to one line and an
exit code.

    HmcError                     1
    |-- UsageError               2   a bad argument: value, path, empty prompt
    |   `-- ContextLengthError   2   more tokens than the plan's context holds
    |-- CheckpointError          3   the model directory cannot be used
    |   |-- ConfigError          3   config.json is absent, unreadable or contradictory
    |   |-- ShardError           3   a shard is absent, truncated or its header lies
    |   |-- TensorError          3   a tensor is missing, extra, mis-shaped or mis-typed
    |   |-- TokenizerError       3   no tokenizer, or one that cannot be read
    |   `-- HubError             3   the hub lacks a model, refuses it or cannot be reached
    |-- CompileError             4   the compiler cannot lower the model
    |   |-- UnsupportedError     4   an unknown family, format or option
    |   |-- PassFailedError      4   a pass met a graph it cannot handle
    |   `-- VerifyError          4   a graph or a plan breaks a rule of meaning
    |-- PlanError                5   a plan cannot be used
    |   |-- PlanFormatError      5   not a plan, another version, or tampered with
    |   |-- PlanMismatchError    5   the checkpoint is not the one the plan was made for
    |   `-- MachineError         5   the machine lacks the ISA, the memory or the device
    |       `-- CapacityError    5   a memory budget does not hold; names the allocation
    `-- ExecutionError           6   something broke while running
        |-- KernelError          6   a kernel could not be built or run
        |-- WorkerError          6   a native worker died or hangs
        |-- QueueFullError       6   too many requests wait already
        `-- RequestTimeoutError  6   a request took longer than a server gives one

A message is one line: what is wrong, where, and what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class HmcError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class UsageError(HmcError):
    """An argument is wrong."""

    exit_code = 2


class ContextLengthError(UsageError):
    """More tokens were asked for than the plan's context holds."""


class CheckpointError(HmcError):
    """The model directory cannot be used."""

    exit_code = 3


class ConfigError(CheckpointError):
    """config.json (or a sibling) is absent, unreadable or contradictory."""


class ShardError(CheckpointError):
    """A safetensors shard is absent, truncated, or its header lies about its data."""


class TensorError(CheckpointError):
    """A tensor is missing, extra, mis-shaped or mis-typed."""


class TokenizerError(CheckpointError):
    """No tokenizer, or one that cannot be read."""


class HubError(CheckpointError):
    """The hub lacks a model or a file, refuses it, cannot be reached, or sends something else."""


class CompileError(HmcError):
    """The compiler cannot lower the model."""

    exit_code = 4


class UnsupportedError(CompileError):
    """A family, format or option hmc does not know."""


class PassFailedError(CompileError):
    """A pass met a graph it cannot handle."""


class VerifyError(CompileError):
    """A graph or a plan breaks a rule of meaning."""


class PlanError(HmcError):
    """A plan cannot be used."""

    exit_code = 5


class PlanFormatError(PlanError):
    """Not a plan, another schema version, or tampered with."""


class PlanMismatchError(PlanError):
    """The checkpoint is not the one the plan was made for."""


class MachineError(PlanError):
    """The machine lacks the ISA, the memory or the device the plan needs."""


class CapacityError(MachineError):
    """A memory budget does not hold; the message names the allocation that broke it."""


class ExecutionError(HmcError):
    """Something broke while running."""

    exit_code = 6


class KernelError(ExecutionError):
    """A kernel could not be built or run."""


class WorkerError(ExecutionError):
    """A native worker died or hangs."""


class QueueFullError(ExecutionError):
    """Too many requests wait already; a later try may succeed."""


class RequestTimeoutError(ExecutionError):
    """A request took longer than a server gives one."""


def wrong_table(name: str, experts: int) -> str:
    """What is said of a table of experts by token that names others than there are."""
    return f"tensor {name} names others than experts 0 to {experts - 1}: the checkpoint is damaged"
