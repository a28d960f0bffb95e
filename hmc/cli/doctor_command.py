"""`hmc doctor`: what this machine offers and what hmc will use of it."""

from __future__ import annotations

import importlib.metadata
import platform
import resource
from importlib.util import find_spec
from pathlib import Path

import click

from hmc import env
from hmc.cli.output import JSON, console, print_json, records, size, table
from hmc.codegen.isa import TIERS, best_isa, cpu_flags
from hmc.errors import HmcError
from hmc.machine.detect import available_bytes, detect
from hmc.machine.topology import text_of

_PACKAGES = ("torch", "numpy", "safetensors", "llvmlite", "pydantic", "tokenizers", "transformers")


@click.command("doctor")
@JSON
def command(as_json: bool) -> None:
    """Show ISA, memory and cgroup limits, huge pages, memlock, GPU and versions, and what hmc will
    use.

    Exits with 5 when this machine cannot run hmc's kernels.
    """
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
        ("NUMA", f"{len(machine.nodes)} node(s)", "workers are spread over all of them"),
        ("last-level cache", size(machine.llc_bytes), "-"),
        (
            "memory",
            f"{size(machine.memory_bytes)} usable, {size(available_bytes())} free now",
            "one copy of the weights, KV cache, activations",
        ),
        ("huge pages", huge or "not offered by this kernel", _huge_use(huge)),
        ("locked memory", _memlock(), "needed by pinned copies to a GPU only"),
        ("GPU", _gpu(), "none: this version computes on the CPU"),
        ("kernel cache", str(env.cache_dir() / "kernels"), _writable(env.cache_dir())),
        ("Python", platform.python_version(), "-"),
    ]
    rows += [(name, _version(name), "-") for name in _PACKAGES]
    if as_json:
        print_json({"rows": records(("item", "found", "used"), rows)})
    else:
        console().print(table("hmc doctor", ("", "found", "used by hmc"), rows))
    if problem is not None:
        raise problem


def _huge_use(text: str) -> str:
    if "[never]" in text:
        return "no: set it to madvise for faster weight reads"
    return "yes, by madvise, for memory hmc allocates"


def _memlock() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else size(soft)


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
