"""The table of docs/formats.md: what every weight format is by its row, how fast this machine's
kernels read it, and how exactly they multiply.

Measured are the kernels that a format is read by (`Format.kernels`), each once: GB/s of one core
from its L2, the streaming read of the same minutes, the share of it at one token and at four, and
the relative error (L2) of a product with bf16 activations against float64 on the same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hmc.bench.cases import Case
from hmc.bench.compare import Report, silent
from hmc.bench.kernels import DEFAULT_MEGABYTES, KernelBench, Matrices
from hmc.codegen.isa import TIERS, Isa
from hmc.codegen.native import arithmetic, has_native
from hmc.formats import FORMATS, GROUP, WHOLE, Format, Plane, format_of, named
from hmc.formats.decode import NUMPY, decode
from hmc.runtime.weights.tensors import array_at

COLUMNS = ("format", "planes", "tensors", "exact in", "native decoders")
MEASURED = ("GB/s from L2", "streaming read, GB/s", "of it, 1 token", "of it, 4 tokens", "error")
_TOKENS = (1, 4)


@dataclass(frozen=True)
class Measured:
    """Of one format: bytes/s from L2, bytes/s of the streaming read beside which it was measured at
    one token, the shares of it by tokens, the error.
    """

    cache_rate: float
    read_rate: float
    shares: tuple[float, ...]
    error: float

    def cells(self) -> tuple[str, ...]:
        """As the table has them."""
        shares = (f"{share:.2f}" for share in self.shares)
        rates = (f"{rate / 1e9:.1f}" for rate in (self.cache_rate, self.read_rate))
        return (*rates, *shares, f"{self.error:.1e}")


def described(row: Format) -> tuple[str, ...]:
    """What its row says, by `COLUMNS`."""
    planes = "; ".join(_plane(plane) for plane in row.planes)
    return f"`{row.name}`", planes, _names(row), ", ".join(row.exact_in), _tiers(row)


def _size(count: int) -> str:
    return {WHOLE: "all", GROUP: "group"}.get(count, str(count))


def _plane(plane: Plane) -> str:
    bits = f", {plane.bits} bits each" if plane.bits else ""
    cover = "" if plane.rows == plane.columns == 1 else (
        f" for {_size(plane.rows)} x {_size(plane.columns)}"
    )  # fmt: skip
    kept = f", read as {' or '.join(plane.kept)}" if plane.kept else ""
    return f"{plane.name}: {' or '.join(plane.dtypes)}{bits}{cover}{kept}"


def _names(row: Format) -> str:
    ends = dict.fromkeys(end for plane in row.planes for end in plane.suffixes)
    return ", ".join(f"`{named('m.weight', end).removeprefix('m.')}`" for end in ends)


def _tiers(row: Format) -> str:
    native = [isa for isa in TIERS if has_native(isa, row.kernels)]
    return ", ".join(f"{isa} ({arithmetic(isa, row.kernels)})" for isa in native) or "made (f32)"


def measure(
    isa: Isa,
    names: Sequence[str],
    *,
    rows: int,
    k: int,
    group: int,
    threads: int | None = None,
    repetitions: int = 9,
    megabytes: int = DEFAULT_MEGABYTES,
    report: Report = silent,
) -> dict[str, Measured]:
    """Each of the formats `names` on matrices of `rows` x `k`."""
    kernels = list(dict.fromkeys(format_of(name).kernels for name in names))
    cases = [Case("linear", name, rows, k, tokens, group) for name in kernels for tokens in _TOKENS]
    turns = {"repetitions": repetitions, "megabytes": megabytes}
    with KernelBench(isa, l2=True) as bench:
        cached = bench.measure(cases[:: len(_TOKENS)], report=report, **turns)
        errors = [_error(bench, case) for case in cases[:: len(_TOKENS)]]
    with KernelBench(isa, threads=threads) as bench:
        streamed = bench.measure(cases, report=report, **turns)
    found = {}
    for at, name in enumerate(kernels):
        of_name = streamed[at * len(_TOKENS) :][: len(_TOKENS)]
        shares = tuple(row.compared.ratio for row in of_name)
        read = of_name[0].compared.reference
        found[name] = Measured(cached[at].compared.value, read, shares, errors[at])
    return {name: found[format_of(name).kernels] for name in names}


def _error(bench: KernelBench, case: Case) -> float:
    (shape,) = case.matrices
    with Matrices((shape,), 1) as matrices:
        x, y = bench.product(case, matrices)
        addresses = [int(each[0]) for each in matrices.planes[0]]
        row, dtypes = format_of(shape.format), [form.kept for form in shape.forms]
        planes = [
            array_at(address, NUMPY.get(form.kept, NUMPY["U8"]), form.shape)
            for form, address in zip(shape.forms, addresses, strict=True)
        ]
        weights = decode(row, planes, dtypes, (shape.rows, shape.k), shape.group)
    exact = x.astype(np.float64) @ weights.astype(np.float64).T
    return float(np.linalg.norm(y - exact) / np.linalg.norm(exact))


def table(names: Sequence[str] = (), measured: dict[str, Measured] | None = None) -> str:
    """Markdown, a row a format; without `measured` of the first columns alone."""
    head = (*COLUMNS, *(MEASURED if measured is not None else ()))
    lines = [head, ("---",) * len(head)]
    for name in names or FORMATS:
        beside = measured[name].cells() if measured is not None else ()
        lines.append((*described(format_of(name)), *beside))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
