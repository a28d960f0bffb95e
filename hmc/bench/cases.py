"""Cases of `hmc bench kernels`: a kernel, a format and a shape, checked; the row each
becomes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hmc.bench.compare import Compared
from hmc.codegen.spec import MAX_TOKENS
from hmc.errors import MachineError, UsageError
from hmc.formats import FORMATS, Form, format_of, forms, kernel_params
from hmc.machine.topology import this_machine
from hmc.runtime.memory.blocks import aligned


@dataclass(frozen=True)
class Kind:
    """What can be measured: products of one token or few, against the streaming read, or of `many`,
    against the multiply-add peak; of one matrix, of `routed` experts with three, or of a state
    in the format `kept`. `probed` is a probe's name for it, `larger` the op for more tokens.
    """

    many: bool
    routed: bool
    probed: str = ""
    larger: str = ""
    kept: str = ""


OPS = {
    "linear": Kind(many=False, routed=False, probed="gemv", larger="gemm"),
    "experts": Kind(many=False, routed=True, probed="experts in decode", larger="grouped"),
    "gemm": Kind(many=True, routed=False, probed="gemm in prefill"),
    "grouped": Kind(many=True, routed=True, probed="grouped in prefill"),
    "linear_attention": Kind(
        many=False, routed=False, larger="linear_attention_prefill", kept="f32"
    ),
    "linear_attention_prefill": Kind(many=True, routed=False, kept="f32"),
}


@dataclass(frozen=True)
class MatrixShape:
    """Rows x K weights in a format, `group` of which share a scale where it is grouped."""

    format: str
    rows: int
    k: int
    group: int = 0

    def __post_init__(self) -> None:
        if not format_of(self.format).whole_groups(self.k, self.group):
            raise UsageError(
                f"{self.rows}x{self.k}: {self.format} rows must be whole groups of {self.group}"
                " weights"
            )

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Stored dtype of each plane: the usual ones."""
        return tuple(plane.dtypes[0] for plane in format_of(self.format).planes)

    @property
    def params(self) -> dict[str, int]:
        """What kernels must know of it besides its format."""
        return kernel_params(format_of(self.format), self.group, self.dtypes)

    @property
    def forms(self) -> tuple[Form, ...]:
        """Its planes."""
        return forms(format_of(self.format), (self.rows, self.k), self.group, self.dtypes)

    @property
    def bytes(self) -> int:
        """All that a kernel reads of it."""
        return sum(form.bytes for form in self.forms)

    @property
    def stride(self) -> int:
        """Bytes it takes in memory."""
        return sum(aligned(form.bytes) for form in self.forms)


@dataclass(frozen=True)
class Case:
    """One row of the table. Experts: `rows` x `k` are gate and up (intermediate x hidden), `top_k`
    of them a token. Linear attention: a state of heads of `k` x `k`, `rows` of them in all."""

    op: str
    format: str
    rows: int
    k: int
    tokens: int
    group: int = 128
    top_k: int = 8

    def __post_init__(self) -> None:
        if self.op not in OPS or self.format not in FORMATS:
            raise UsageError(
                f"{self.op} of {self.format}: ops are {', '.join(OPS)},"
                f" formats {', '.join(FORMATS)}"
            )
        if min(self.rows, self.k, self.tokens, self.top_k) < 1:
            raise UsageError(f"{self.shape}, {self.tokens} tokens: sizes must be positive")
        if not self.kind.many and self.tokens > MAX_TOKENS:
            raise UsageError(
                f"{self.op} takes 1 to {MAX_TOKENS} tokens, not {self.tokens}: larger batches are"
                f" --op {self.kind.larger}"
            )
        if self.kind.kept and (self.format != self.kind.kept or self.rows % self.k or self.k % 4):
            raise UsageError(
                f"{self.op} of {self.format} {self.shape}: states are f32, of heads of KxK; K a"
                " multiple of 4, rows one of K"
            )
        if self._grouped and self.group not in (32, 64, 128):
            raise UsageError(f"{self.format} groups are 32, 64 or 128 weights, not {self.group}")
        _ = self.matrices  # raises for rows that are no whole groups, before anything is measured

    @property
    def _grouped(self) -> bool:
        return format_of(self.format).grouped

    @property
    def kind(self) -> Kind:
        """What its op measures."""
        return OPS[self.op]

    @property
    def shape(self) -> str:
        """`rowsxk`."""
        return f"{self.rows}x{self.k}"

    @property
    def matrices(self) -> tuple[MatrixShape, ...]:
        """What one call (linear), one expert or one sequence reads."""
        group = self.group if self._grouped else 0
        into = MatrixShape(self.format, self.rows, self.k, group)
        if not self.kind.routed:
            return (into,)
        return (into, into, MatrixShape(self.format, self.k, self.rows, group))

    @property
    def flops(self) -> int:
        """Of one call: a multiply-add counts two."""
        each = 2 * self.rows * self.k * self.tokens
        if self.kind.kept:  # what the state tells of keys and of queries, and what it learns
            return 3 * each
        return 3 * self.top_k * each if self.kind.routed else each


@dataclass(frozen=True)
class Row:
    """What a case gave: bytes/s or, for prefill, FLOP/s, beside the reference's."""

    case: Case
    compared: Compared

    def record(self) -> dict[str, str | int | float]:
        """As JSON has it."""
        unit = "gflops" if self.case.kind.many else "gbps"
        return {
            "op": self.case.op,
            "format": self.case.format,
            "shape": self.case.shape,
            "tokens": self.case.tokens,
            unit: round(self.compared.value / 1e9, 3),
            f"reference_{unit}": round(self.compared.reference / 1e9, 3),
            "ratio": round(self.compared.ratio, 4),
        }


def cut_to_cache(case: Case) -> Case:
    """The case with as many rows as fill half of a core's L2."""
    sizes = [cache.bytes for cache in this_machine().caches if cache.level == 2]
    if not sizes:
        raise MachineError("--l2: this machine does not tell the size of its L2 cache")
    row = -(-sum(shape.bytes for shape in case.matrices) // case.rows)
    rows = min(case.rows, max(16, min(sizes) // 2 // row // 16 * 16))
    return replace(case, rows=rows)
