"""`hmc doctor`: what this machine offers, what hmc will use of it, and what makes it slower than it
has to be.
"""

from __future__ import annotations

import importlib.metadata
import platform
import resource
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import click

from hmc import env
from hmc.cli.output import JSON, console, print_json, records, size, table
from hmc.codegen.isa import TIERS, best_isa, cpu_flags
from hmc.errors import HmcError
from hmc.files import text_of
from hmc.machine.checkup import Finding, Needs, checkup, read_speed, slow_disk
from hmc.machine.detect import available_bytes, detect
from hmc.machine.model import Machine
from hmc.machine.topology import this_machine
from hmc.plan import load_plan
from hmc.runtime.memory.nodes import refusal

_PACKAGES = ("torch", "numpy", "safetensors", "llvmlite", "pydantic", "tokenizers", "transformers")


@click.command("doctor")
@click.argument("plan_path", metavar="[PLAN]", required=False)
@click.option(
    "--read-test",
    metavar="FILE",
    help="Read up to 1 GiB of FILE from its disk, for 2 s at most: a shard of the model, say.",
)
@JSON
def command(plan_path: str | None, read_test: str | None, as_json: bool) -> None:
    """Show ISA, memory and cgroup limits, huge pages, memlock, GPU and versions, and what hmc will
    use; then what hurts on this machine (with PLAN also in memory), what that costs, and the
    command that mends it.

    Exits with 5 when this machine cannot run hmc's kernels.
    """
    needs = _needs(plan_path) if plan_path else None
    speed = read_speed(Path(read_test)) if read_test else None
    machine = detect()
    problem: HmcError | None = None
    try:
        isa = best_isa().name
    except HmcError as error:
        isa, problem = f"none: {error}", error
    flags = cpu_flags()
    huge = text_of(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    rows: list[tuple[str, str, str]] = [
        ("CPU", f"{machine.cpu}, {machine.cores} usable cores", f"{env.threads()} native workers"),
        (
            "kernel tier",
            ", ".join(t.name for t in TIERS.values() if t.flags <= flags) or "none",
            isa,
        ),
        ("NUMA", f"{len(machine.nodes)} node(s)", _numa_use(machine)),
        ("last-level cache", size(machine.llc_bytes), "-"),
        (
            "memory",
            f"{size(machine.memory_bytes)} usable, {size(available_bytes())} free now",
            "one copy of the weights, KV cache, activations",
        ),
        ("huge pages", huge or "not offered by this kernel", _huge_use(huge)),
        ("locked memory", _memlock(), "needed by pinned copies to a GPU only"),
        ("GPU", _gpu(), "plans that are made for GPUs; plans for the CPU need none"),
        ("kernel cache", str(env.cache_dir() / "kernels"), _writable(env.cache_dir())),
        ("Python", platform.python_version(), "-"),
    ]
    rows += [(name, _version(name), "-") for name in _PACKAGES]
    findings = checkup(this_machine().cpus, isa="" if problem else isa, needs=needs)
    if read_test and speed is not None:
        rows.append(("disk", f"{speed / 1e6:.0f} MB/s from {read_test}", "weights are read once"))
        findings += slow_disk(Path(read_test), speed, needs.weights if needs else 0)
    if as_json:
        told = [asdict(finding) for finding in findings]
        print_json({"rows": records(("item", "found", "used"), rows), "findings": told})
    else:
        console().print(table("hmc doctor", ("", "found", "used by hmc"), rows))
        _tell(findings)
    if problem is not None:
        raise problem


def _needs(path: str) -> Needs:
    """Host bytes of the plan of a file."""
    items = [item for item in load_plan(path).ledger if item.device == "host"]
    weights = sum(item.bytes for item in items if item.detail == "weights")
    return Needs(weights, sum(item.bytes for item in items) - weights)


def _tell(findings: Sequence[Finding]) -> None:
    """A few lines each: a command in a table's column would be broken."""
    click.echo("\nWhat hurts" if findings else "\nNothing found that hurts.")
    for each in findings:
        click.echo(f"  {each.item}: {each.found}\n    costs: {each.cost}\n    mends: {each.mend}")


def _huge_use(text: str) -> str:
    if "[never]" in text:
        return "no: set it to madvise for faster weight reads"
    return "yes, by madvise, for memory hmc allocates"


def _memlock() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else size(soft)


def _numa_use(machine: Machine) -> str:
    if len(machine.nodes) == 1:
        return "memory is placed where there are several"
    why = refusal(machine.nodes[0].home)
    how = f"by first touch, {why}" if why else "bound"
    return f"--home arena: weights lie with the workers that multiply them, {how}"


def _gpu() -> str:
    nodes = sorted(Path("/dev").glob("nvidia[0-9]*"))
    return f"{len(nodes)} NVIDIA device node(s)" if nodes else "none"


def _writable(folder: Path) -> str:
    while not folder.exists():
        folder = folder.parent
    try:
        probe = folder / ".hmc-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"NOT writable: {error.strerror}; set HMC_CACHE"
    return "writable"


def _version(name: str) -> str:
    return importlib.metadata.version(name) if find_spec(name) else "not installed"
