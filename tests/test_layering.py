"""The rules of the house: who may import whom, and that the toolkit answers without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = {"errors", "env", "machine", "graph", "plan", "planfile", "verify", "version", "printer"}
CORE |= {"cost", "device_memory", "timeline"}

# package -> what of hmc it may import (first part of the name after "hmc.")
ALLOWED: dict[str, set[str]] = {
    "hmc/blocks": CORE | {"blocks"},
    "hmc/checkpoint": {"errors", "env", "checkpoint"},
    "hmc/models": CORE | {"blocks", "checkpoint", "models"},
    "passes": CORE | {"blocks", "checkpoint", "passes", "codegen.spec"},
    "codegen": {"errors", "env", "codegen"},
    "hmc/serve": {"errors", "plan", "verify", "version", "runtime", "serve"},
    "runtime": CORE - {"graph", "printer"} | {"detect", "checkpoint", "codegen", "runtime"},
}
FORBIDDEN_LIBRARIES = {"codegen": {"torch"}, "hmc/checkpoint": {"torch"}, "hmc/serve": {"torch"}}


def _imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted name, inside a function) of every import outside `if TYPE_CHECKING`."""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, inside: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                found.append((base, inside))
                if base in ("hmc", "hmc.codegen"):
                    found.extend((f"{base}.{alias.name}", inside) for alias in child.names)
            visit(child, inside or isinstance(child, ast.FunctionDef))

    visit(ast.parse(path.read_text()), inside=False)
    return found


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_a_package_imports_only_what_it_may(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        for name, _ in _imports(path):
            assert name.split(".")[0] not in FORBIDDEN_LIBRARIES.get(package, set()), path
            if not name.startswith("hmc."):
                continue
            part = name.removeprefix("hmc.")
            if part == "codegen" and package == "passes":
                continue  # `from hmc.codegen import spec` is listed by its full name too
            allowed = ALLOWED[package]
            assert part in allowed or part.split(".")[0] in allowed, f"{path} imports {name}"


def test_core_imports_none_of_the_other_packages() -> None:
    for module in CORE:
        for name, _ in _imports(ROOT / "hmc" / f"{module}.py"):
            if name.startswith("hmc."):
                assert name.removeprefix("hmc.") in CORE, f"{module} imports {name}"


def test_no_import_hides_in_a_function() -> None:
    for package in ("hmc", "passes", "codegen", "runtime"):
        for path in (ROOT / package).rglob("*.py"):
            if "cli" in path.parts or path.is_symlink():
                continue
            assert not [name for name, inside in _imports(path) if inside], path


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
