"""Compiles the played CUDA libraries for the PyTorch of this Python.

Which functions they need, and the libraries' names and versions, are read from PyTorch's own
libraries. What no C file defines becomes a function that writes its name into the log and returns 0
("unwritten NAME"). Hides compilers, headers and symbol versions.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from hmc.errors import MachineError

SOURCES = Path(__file__).parent / "c"
SECONDS = 300.0
"""A compiler that takes longer hangs."""
_RUNTIME = ("log", "device", "memory", "copies", "streams", "capture", "kernels")
_ATTRIBUTES = ("__host__ __device__ __device_builtin__ __cudart_builtin__ CUDARTAPI"
               " CUDARTAPI_CDECL __device_builtin_texture_type__"
               " __device_builtin_surface_type__")  # fmt: skip
_MISSING_HEADERS = {
    "crt/host_defines.h": "".join(f"#define {name}\n" for name in _ATTRIBUTES.split())
    + "#define __forceinline__ __inline__\n"
    + "#define __align__(n) __attribute__((aligned(n)))\n"
    + "#define __builtin_align__(n) __align__(n)\n",
    "nv/target": "",
}
"""Headers that the wheels leave out, as far as C needs them."""
_SHARED = """void fake_line(const char *, ...);
int fake_product(void *, const char *);
"""


@dataclass(frozen=True)
class Library:
    """One of the played libraries: its file, and what of PyTorch's wants it is said to have."""

    path: Path
    written: int
    generated: int


def build(folder: Path) -> tuple[Library, ...]:
    """Compile everything into `folder`; `MachineError` where that is not possible, with the reason.

    Takes some seconds, and is done anew every time.
    """
    if torch.version.cuda is None:
        raise MachineError("this PyTorch was built without CUDA: `make gpu-fake` installs one")
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in _MISSING_HEADERS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    wanted = _wanted()
    built = [_library(folder, "cudart", wanted, _RUNTIME, ["-ldl", "-lpthread"])]
    runtime = str(built[0].path)
    for stem, source in (("cublas", "blas"), ("cublasLt", "lt"), ("cuda", "driver")):
        built.append(_library(folder, stem, wanted, (source,), [runtime]))
    return tuple(built)


def _wanted() -> dict[str, set[str]]:
    """By the name of each library, the functions that PyTorch calls of it."""
    here = Path(torch.__file__).parent / "lib"
    undefined = _output("nm", "-D", "--undefined-only", *map(str, sorted(here.glob("lib*.so"))))
    found: dict[str, set[str]] = {}
    for name, library in re.findall(
        r" U (\w+)@(lib(?:cudart|cublas|cublasLt)\.so\.\d+)", undefined
    ):
        found.setdefault(library, set()).add(name)
    driver = (include("cuda.h") / "cuda.h").read_text()  # it is opened by name, by whoever wants it
    found["libcuda.so.1"] = set(re.findall(r"\b(cu[A-Z]\w+)\b", driver))
    return found


def _library(
    folder: Path, stem: str, wanted: dict[str, set[str]], sources: tuple[str, ...], links: list[str]
) -> Library:
    named = [name for name in wanted if name.startswith(f"lib{stem}.so.")]
    if len(named) != 1:
        raise MachineError(f"PyTorch {torch.__version__} uses {len(named)} libraries named {stem}")
    name, objects = named[0], [_compiled(folder, SOURCES / f"{each}.c") for each in sources]
    symbols = set(re.findall(r" [TD] (\w+)", _output("nm", "--defined-only", *map(str, objects))))
    missing = sorted(wanted[name] - symbols)
    rest = folder / f"{stem}_rest.c"
    rest.write_text(_SHARED + "".join(_function(each, stem == "cublas") for each in missing))
    versions = folder / f"{stem}.map"
    own = f"{name} {{ global: cu*; __cuda*; fake_*; local: *; }};\n"
    versions.write_text("{ global: cu*; };\n" if stem == "cuda" else own)
    target = folder / name
    shared = ["-shared", f"-Wl,-soname,{name}", f"-Wl,--version-script={versions}"]
    made = [*map(str, objects), str(_compiled(folder, rest))]
    _output("gcc", *shared, "-o", str(target), *made, *links)
    return Library(target, len(wanted[name]) - len(missing), len(missing))


def _compiled(folder: Path, source: Path) -> Path:
    target = folder / f"{source.stem}.o"
    flags = ["-O1", "-fPIC", "-Wall", "-Wno-unused-parameter", f"-I{folder}", f"-I{SOURCES}"]
    flags += [f"-I{include(each)}" for each in ("cuda_runtime_api.h", "cublas_v2.h", "cuda.h")]
    numbers = ",".join(each[3:] for each in _architectures())
    flags.append(f"-DARCHITECTURES={numbers}")
    _output("gcc", "-c", *flags, "-o", str(target), str(source))
    return target


def _architectures() -> list[str]:
    """Those whose kernels PyTorch brings, "sm_80" and the like."""
    return re.findall(r"\bsm_\d+\b", torch._C._cuda_getArchFlags() or "")


def _function(name: str, products: bool) -> str:
    """A function nobody wrote: of cuBLAS, what neither sets nor gets anything is a product."""
    if products and not re.search("Set|Get", name):
        return f'int {name}(void *h) {{ return fake_product(h, "{name}"); }}\n'
    told = "" if name.startswith("__") else f'fake_line("unwritten {name}"); '
    return f"int {name}(void) {{ {told}return 0; }}\n"


def include(header: str) -> Path:
    """The folder that has a header, of the packages that came with PyTorch."""
    packages = Path(torch.__file__).parents[1] / "nvidia"
    found = sorted(packages.glob(f"**/include/{header}"))
    if not found:
        raise MachineError(f"{header} is in none of PyTorch's packages in {packages}")
    return found[0].parent


def _output(*command: str) -> str:
    """What a tool prints; `MachineError` with what it complains of."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    except FileNotFoundError as error:
        raise MachineError(f"{command[0]} is missing: install gcc and binutils") from error
    except subprocess.TimeoutExpired as error:
        raise MachineError(f"{command[0]} did not end within {SECONDS:g} s") from error
    if done.returncode:
        raise MachineError(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-800:]}")
    return done.stdout
