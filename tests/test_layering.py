"""The rules of the house: who may import whom, that every module can be the first, and that the
toolkit answers without torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

ROOMS = """
hmc.__main__
hmc/cli/bench hmc/cli hmc/cli/chat
hmc/hub
hmc/bench/serve hmc/report hmc/tune hmc/serve hmc/serve/page hmc/bench/probe hmc/bench
runtime/batching runtime/prefill runtime/engine runtime/tokens runtime/executor
runtime/phases runtime/ranks runtime/binding runtime/schedule runtime/device_ops/gpu
runtime/device_ops runtime/device_ops/triton runtime/host
hmc hmc/compiler hmc/quantize hmc/models
passes passes/manager passes/place passes/stream passes/emit passes/graph passes/records
hmc/blocks hmc/graph
hmc/predict
runtime/devices runtime/weights runtime/memory runtime/routing runtime/children runtime
hmc/plan hmc/ops hmc/machine hmc/checkpoint/gguf hmc/checkpoint
codegen/build codegen/kernels codegen/kernels/compressed codegen/kernels/attention
codegen/kernels/matmul codegen/kernels/recurrent codegen/kernels/pointwise
codegen/kernels/routing codegen/kernels/probes codegen/triton
codegen/pool codegen/panel codegen/decode codegen/formats
codegen codegen/ragged codegen/functions codegen/vector codegen/ir codegen/jit codegen/cache
codegen/checks codegen/arguments codegen/native codegen/rowwise codegen/spec codegen/isa
codegen/expr hmc/formats
hmc/first_fault hmc/ranges hmc/closing hmc/env hmc/cgroup hmc/files hmc/errors hmc/version
""".split()
"""Every folder, and every module of a top-level folder, from the top of the house to its ground: an
import goes down. Names are of folders, dots where slashes are."""

WITHIN = {"hmc/serve/messages": "hmc/serve", "hmc/serve/responses": "hmc/serve"}
"""Folders that are of one room with another: an interface needs the server's forms, and the
server's routes the interface."""

FORBIDDEN = {
    "codegen": "torch",
    "hmc/formats": "torch",
    "hmc/checkpoint": "torch",
    "hmc/serve": "torch",
    "hmc/hub": "torch",
}
"""Folder -> a library that nothing in it may import."""


def _modules() -> dict[str, Path]:
    """Every module by its dotted name."""
    found = {}
    for top in ("hmc", "passes", "runtime", "codegen"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] in (("hmc", "passes"), ("hmc", "runtime"), ("hmc", "codegen")):
                continue  # the same files by their links
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts if top == "hmc" else ("hmc", *parts))] = path
    return found


MODULES = _modules()


def _room(module: str) -> str:
    """The folder of a module, or itself where it lies in a top-level folder."""
    path = MODULES[module].relative_to(ROOT)
    if path.name == "__init__.py" or len(path.parts) > 2:
        return WITHIN.get(str(path.parent), str(path.parent))
    return str(path.with_suffix(""))


@cache
def _imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, inside a function) of every import outside `if TYPE_CHECKING`."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                names = [f"{base}.{alias.name}" for alias in child.names]
                yield from ((name if name in MODULES else base, inside) for name in names)
            functions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
            yield from visit(child, inside or isinstance(child, functions))

    return list(visit(ast.parse(path.read_text()), inside=False))


def test_every_import_goes_down() -> None:
    order = {room.replace("hmc.__main__", "hmc/__main__"): at for at, room in enumerate(ROOMS)}
    for module, path in MODULES.items():
        assert _room(module) in order, f"{path} is in no room"
        for name, _ in _imports(path):
            if name.split(".")[0] != "hmc" or _room(name) == _room(module):
                continue
            assert order[_room(module)] < order[_room(name)], f"{path} imports {name}"


def test_folders_do_without_the_libraries_that_they_must_not_need() -> None:
    for module, path in MODULES.items():
        for folder, library in FORBIDDEN.items():
            if f"{_room(module)}/".startswith(f"{folder}/"):
                assert library not in {name.split(".")[0] for name, _ in _imports(path)}, path


def test_no_import_hides_in_a_function() -> None:
    for path in MODULES.values():
        if "cli" not in path.parts:
            assert not [name for name, inside in _imports(path) if inside], path


def _packages(module: str) -> set[str]:
    """The packages that a module lies in, which Python imports before it."""
    parts = module.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def test_no_circle_of_imports_keeps_a_module_from_being_the_first() -> None:
    """An import runs the module and those packages of its that are not under way already. Where no
    module reaches itself so, none meets another half done, whichever comes first.
    """
    needs: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        names = {name for name, inside in _imports(path) if name in MODULES and not inside}
        around = set().union(*map(_packages, names)) - _packages(module)
        needs[module] = (names | around) - {module}
    try:
        list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.slow
def test_every_module_can_be_the_first(tmp_path: Path) -> None:
    """In a process each, forked from one that has loaded the libraries and nothing of hmc; what one
    process compiles, the next ones read."""
    names = [name for name in MODULES if not name.endswith("__main__")]
    script = f"""
import gc, importlib, os, sys, traceback
import click, jinja2, llvmlite.binding, networkx, numpy, psutil, pydantic, rich, torch.fx
import starlette.applications, tokenizers
sys.dont_write_bytecode, sys.pycache_prefix = False, {str(tmp_path)!r}
gc.freeze()
for name in {names!r}:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            print(name, traceback.format_exc(), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        sys.exit(1)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_the_three_folders_are_links() -> None:
    for name in ("passes", "runtime", "codegen"):
        link = ROOT / "hmc" / name
        assert link.is_symlink() and str(link.readlink()) == f"../{name}"


@pytest.mark.parametrize(
    "statement", ["import hmc", "import hmc.plan", "import hmc.cli", "import hmc.cli.show_command"]
)
def test_the_toolkit_does_not_load_torch(statement: str) -> None:
    check = f"{statement}; import sys; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


NAMES = "fp8 int4 bf16 fp16 f32 attention mla experts linear gate_up route norm embedding rotary"
COMPARED = re.compile(rf'(==|!=|\bin) *\(?"({NAMES.replace(" ", "|")})"')
HOMES = ("hmc/ops", "hmc/formats", "hmc/blocks", "codegen/formats", "codegen/kernels")
HOMES += ("codegen/isa", "runtime/device_ops")
REASONS = {
    "codegen/ir.py": "the kind of an argument word, a float's bits",
    "codegen/arguments.py": "the same, where words are packed",
    "runtime/host/records.py": "the same, where they are filled in",
    "hmc/models/rope.py": "rope_type of a config.json",
    "hmc/plan/diff.py": "a field of the plan",
    "passes/graph/fuse.py": "the dtype of a value between ops",
    "passes/graph/pieces.py": "the dtype of a value between ops",
    "passes/graph/trace.py": "the dtype of a value between ops",
    "passes/place/needs.py": "the half of a layer",
    "passes/stream/emit.py": "attributes of a step",
}
"""Where a word that is also an op's or a format's is compared, and what it means there."""


def test_names_of_ops_and_formats_are_compared_in_their_homes() -> None:
    """Elsewhere the row is asked."""
    found: list[str] = []
    for path in MODULES.values():
        where = str(path.relative_to(ROOT))
        if not where.startswith(HOMES):
            lines = path.read_text().splitlines()
            found += [where for line in lines if COMPARED.search(line)]
    assert set(found) <= set(REASONS), sorted(set(found) - set(REASONS))
    assert len(found) <= 15
