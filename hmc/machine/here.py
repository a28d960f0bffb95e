"""Which machine's rates predict what runs here: those of the plan, or the profile that a probe
saved; hides where profiles are.
"""

from __future__ import annotations

from pathlib import Path

from hmc.env import config_dir
from hmc.errors import MachineError
from hmc.machine.detect import detect, load_machine
from hmc.machine.model import Machine


def profile_path() -> Path:
    """The saved profile of this machine; there may be none."""
    return config_dir() / "machine.json"


def machine_here(planned: Machine, name: str | None = None) -> Machine | None:
    """A machine with CPU rates that are true here: the one named, else `planned` (a plan's), else
    the saved profile; None where neither has rates, or both are of another machine.

    Raises `UsageError` or `MachineError` for a machine that was named and has no rates.
    """
    if name is not None:
        machine = load_machine(name)
        if machine.rates is None:
            raise MachineError(f"--machine {name} declares no rates: `hmc probe` measures them")
        return machine
    path = profile_path()
    if planned.rates is None and not path.exists():
        return None
    here = detect()
    if planned.rates is not None and _same(planned, here):
        return planned
    if path.exists():
        machine = load_machine(str(path))
        if machine.rates is not None and _same(machine, here):
            return machine
    return None


def how_to() -> str:
    """What to do where there is none."""
    return "no prediction: run `hmc probe` once, when nothing else runs"


def _same(machine: Machine, here: Machine) -> bool:
    return (machine.cpu, machine.cores) == (here.cpu, here.cores)
