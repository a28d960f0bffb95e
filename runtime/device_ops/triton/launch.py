"""Matrix products of stored weights by hmc's Triton kernels: tensors in, tensors out; hides tiles,
grids and what is bound in Triton. No policy: whoever calls knows that there is a GPU and Triton.

Everything is handed to the current stream of x's device; nothing waits and no value is read. x is
bf16 [T, K] of contiguous rows, sums are f32.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import lcm
from typing import Any

import torch

from hmc.codegen.expr import SWIGLU, weighs
from hmc.codegen.triton import build, table
from hmc.codegen.triton.layout import STEP, Layout
from hmc.formats import format_of
from hmc.runtime.weights.torch_view import TORCH

_NAMES = {dtype: name for name, dtype in TORCH.items()}
_UNITS = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_TILES = 1 << 12
_PAGED_BYTES = 128 << 20


class Workspace:
    """What split sums need of a device: 8 MiB for parts of sums, and counters, 0 between launches.
    Launches that share one follow each other: one a stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.partials = torch.empty(table.PARTIALS, dtype=torch.float32, device=device)
        self.counters = torch.zeros(_TILES, dtype=torch.int32, device=device)

    @cached_property
    def paged(self) -> torch.Tensor:
        """What the library of paged attention works in: as much as it asks for, 0 at first."""
        return torch.zeros(_PAGED_BYTES, dtype=torch.uint8, device=self.counters.device)


@dataclass(frozen=True)
class Weight:
    """A stored matrix [rows, columns] as kernels take it: its planes as words, and the f32 values
    of its codes after them.
    """

    planes: tuple[torch.Tensor, ...]
    layout: Layout
    rows: int
    columns: int

    @staticmethod
    def of(
        planes: Sequence[torch.Tensor], form: str, shape: tuple[int, int], group: int = 0
    ) -> Weight:
        """Of planes as a format's row orders them (contiguous, in any shape). `UnsupportedError`
        for a format that kernels cannot read.
        """
        layout = Layout.of(format_of(form), [_NAMES[plane.dtype] for plane in planes], group)
        words = [planes[0].view(-1)]
        if words[0].dtype not in _FLOATS:
            words[0] = words[0].view(_UNITS[layout.unit])
        words += [_words(plane.view(-1)) for plane in planes[1:]]
        return Weight((*words, _values(layout, planes[0].device)), layout, *shape)

    @property
    def stride(self) -> int:
        """Units from row to row."""
        return self.layout.stride(self.columns)

    @property
    def whole_rows(self) -> int:
        """Rows that share scales: a part begins with one of them."""
        return lcm(*(scale.rows or self.rows for scale in self.layout.scales))

    def part(self, first: int, last: int) -> Weight:
        """Rows [first, last), where `first` is a multiple of `whole_rows`; a view."""
        planes = [self.planes[0][first * self.stride :]]
        for scale, plane in zip(self.layout.scales, self.planes[1:-1], strict=True):
            across = -(-self.columns // scale.columns) if scale.columns else 1
            planes.append(plane[first // (scale.rows or self.rows) * across :])
        return Weight((*planes, self.planes[-1]), self.layout, last - first, self.columns)


@dataclass(frozen=True)
class Terms:
    """x [T, K] as the sum of two E4M3 numbers: codes [2, T, K], the second in sixteenths, and f32
    scales [T, blocks of 128 columns]; for FP8 weights on compute capability 8.9 and later.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @staticmethod
    def of(x: torch.Tensor, layout: Layout) -> Terms:
        """Of x bf16; `layout` is any that it will be multiplied with."""
        tokens, columns = x.shape
        blocks = -(-columns // STEP)
        codes = x.new_empty((2, tokens, columns), dtype=torch.float8_e4m3fn)
        scales = x.new_empty((tokens, blocks), dtype=torch.float32)
        build.kernels(layout, eights=True).terms[-(-tokens // table.TERMS), blocks](
            x, codes, scales, tokens, columns, TOKENS=table.TERMS
        )
        return Terms(codes, scales)

    def __len__(self) -> int:
        return self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self.codes.device


X = torch.Tensor | Terms
"""Rows to be multiplied: bf16 [T, K], or the same as `Terms`."""


def _taken(x: X) -> Any:
    """As kernels take it."""
    return (x.codes, x.scales) if isinstance(x, Terms) else x


def _words(plane: torch.Tensor) -> torch.Tensor:
    return plane if plane.dtype in _FLOATS else plane.view(torch.uint8)


@cache
def _values(layout: Layout, device: torch.device) -> torch.Tensor:
    return torch.tensor(layout.values or (0.0,), dtype=torch.float32, device=device)


Biases = tuple[torch.Tensor, ...]
_BIASES = {
    kind: str(kind).removeprefix("torch.")
    for kind in (torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Experts:
    """The experts of a step on one device: `ids` i32 [n], ascending, `table` i64 [n, planes of
    gate (`gated`), up and down, and biases] with their addresses; `into`, up of one, and `down` say
    what all are like, `bias` what dtype biases have ("" where there are none).
    """

    ids: torch.Tensor
    table: torch.Tensor
    into: Weight
    down: Weight
    bias: str = ""
    gated: bool = True

    @cached_property
    def downs(self) -> torch.Tensor:
        """`table` from the planes of down on."""
        return self.table.view(-1)[(1 + self.gated) * self.into.layout.planes :]

    @staticmethod
    def of(experts: Iterable[tuple[int, tuple[Weight, ...], Biases]]) -> Experts:
        """Of (id, (gate, up, down) or (up, down), their biases or nothing), at least one. Planes
        lie at multiples of 16 bytes, and are kept alive by the caller, as biases are.
        """
        every = sorted(experts, key=lambda each: each[0])
        _, (*into, down), biases = every[0]
        device = down.planes[0].device
        rows = [
            [
                *(plane.data_ptr() for w in matrices for plane in w.planes[:-1]),
                *(bias.data_ptr() for bias in own),
            ]
            for _, matrices, own in every
        ]
        ids = [number for number, _, _ in every]
        return Experts(
            torch.tensor(ids, dtype=torch.int32, device=device),
            torch.tensor(rows, dtype=torch.int64, device=device),
            into[-1],
            down,
            _BIASES[biases[0].dtype] if biases else "",
            len(into) == 2,
        )


def matmul(
    x: X,
    w: Weight,
    work: Workspace,
    *,
    out: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`out` [T, rows], f32 or bf16, contiguous (default: a new f32 one), = x w^T + bias [rows]."""
    y = torch.empty((len(x), w.rows), dtype=torch.float32, device=x.device) if out is None else out
    _linear(x, w, w, work, y, (bias, None), SWIGLU, pair=False)
    return y


def gate_up(
    x: X,
    gate: Weight,
    up: Weight,
    work: Workspace,
    *,
    out: torch.Tensor | None = None,
    act: str = SWIGLU,
    biases: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None),
) -> torch.Tensor:
    """`out` [T, rows], f32 or bf16 (default: a new bf16 one), = the activation of x gate^T and
    x up^T, which are alike, each plus its bias [rows]: both, or none."""
    y = (
        torch.empty((len(x), gate.rows), dtype=torch.bfloat16, device=x.device)
        if out is None
        else out
    )
    _linear(x, gate, up, work, y, biases, act, pair=True)
    return y


def _linear(
    x: X, w: Weight, other: Weight, work: Workspace, y: torch.Tensor,
    biases: tuple[torch.Tensor | None, torch.Tensor | None], act: str, *, pair: bool,
) -> None:  # fmt: skip
    tokens, bias = len(x), biases[0]
    one, two = (w.planes[-1] if each is None else each for each in biases)
    eights = isinstance(x, Terms)
    name = "pair" if pair else "linear"
    tile = _tile(name, w, x.device, tokens, eights)
    tiles = -(-tokens // tile.tokens) * -(-w.rows // tile.rows)
    parts = table.parts(tile, tiles, w.columns, processors(x.device), pair)
    build.kernels(w.layout, act, eights).linear[tiles, parts](
        _taken(x), w.planes, other.planes, one, two, y,
        work.partials, work.counters, tokens, w.rows, w.columns, w.stride, parts,
        **tile.constants, **tile.options, PAIR=pair, SPLIT=parts > 1, BIAS=bias is not None,
    )  # fmt: skip


def _tile(
    name: str, w: Weight, device: torch.device, tokens: int, eights: bool = False
) -> table.Tile:
    """The tile of a kernel."""
    found = arch(device)
    return table.tile(name, found, tokens, eights).of(w.layout, found)


def experts(
    x: torch.Tensor,
    slots: torch.Tensor,
    edges: torch.Tensor,
    routing: torch.Tensor,
    held: Experts,
    work: Workspace,
    y: torch.Tensor,
    *,
    top_k: int,
    adds: bool,
    act: str = SWIGLU,
    budget: int = 1 << 28,
    eights: bool = False,
) -> None:
    """y f32 [T, hidden], plus what it is where it `adds`, = the sum over a token's experts among
    `held` of routing times down(activation(gate x, up x)), or where the activation has the weight
    in it of that alone.

    `slots` [T * top_k] i32 or i64 are sorted by expert, ascending within each; `edges` [experts of
    the model + 1] i32 or i64 say where those of each begin; `routing` f32 is by slot. The
    activations of as many tokens as keep to `budget` bytes (at least of some hundred) are held at
    once. `eights`: of more than a few tokens, x and activations are multiplied as `Terms`.
    """
    tokens, inner = len(x), held.into.rows
    mean = tokens * top_k // (len(edges) - 1)
    if tokens <= table.FEW:
        hidden = x.new_empty((tokens * top_k, inner))
        _act(x, hidden, slots, routing, edges[:-1], edges[1:], held, 0, top_k, act, mean)
        _down_few(hidden, slots, edges, routing, held, work, y, tokens, top_k, act, adds)
        return
    if not adds:
        y.zero_()
    span, spans = _spans(tokens, top_k, held, budget, processors(x.device))
    counts = slots.new_empty((-(-tokens // span) + 1, len(edges) - 1), dtype=torch.int32)
    kernels = build.kernels(held.down.layout, act)
    kernels.bounds[len(counts), -(-(len(edges) - 1) // table.BOUNDS)](
        slots, edges, counts, len(edges) - 1, span, top_k, tokens.bit_length(),
        BLOCK=table.BOUNDS,
    )  # fmt: skip
    hidden = x.new_empty((min(tokens, span * spans) * top_k, inner))
    for first in range(0, len(counts) - 1, spans):
        last = min(first + spans, len(counts) - 1)
        part = x[first * span : last * span]
        rows: X = Terms.of(part, held.into.layout) if eights else part
        _act(rows, hidden, slots, routing, counts[first], counts[last], held,
             first * span * top_k, top_k, act, mean)  # fmt: skip
        acts: X = Terms.of(hidden, held.down.layout) if eights else hidden
        _down(acts, slots, counts[first:], routing, held, y, first * span * top_k, last - first,
              top_k, act, mean)  # fmt: skip


def _spans(tokens: int, top_k: int, held: Experts, budget: int, processors: int) -> tuple[int, int]:
    """Tokens whose sums one program owns, and how many times as many have activations at once."""
    fitting = max(table.LEAST_SPAN, budget // (2 * top_k * held.into.rows))
    batch = -(-tokens // -(-tokens // fitting))
    spans = table.spans(held.down.rows, batch, processors)
    return -(-batch // spans), spans


def _act(
    x: X, hidden: torch.Tensor, slots: torch.Tensor, routing: torch.Tensor, begins: torch.Tensor,
    ends: torch.Tensor, held: Experts, first: int, top_k: int, act: str, mean: int,
) -> None:  # fmt: skip
    w, count = held.into, len(held.ids)
    eights = isinstance(x, Terms)
    tile = _tile("experts_act", w, x.device, mean, eights)
    most = min(len(hidden), len(hidden) // tile.tokens + count)
    build.kernels(w.layout, act, eights).experts_act[most, -(-w.rows // tile.rows)](
        _taken(x), len(x), slots, routing, held.ids, begins, ends, held.table, w.planes[-1], hidden,
        first, count, top_k, w.rows, w.columns, w.stride, **tile.constants, **tile.options,
        **_sizes(held, act),
    )  # fmt: skip


def _down(
    hidden: X, slots: torch.Tensor, counts: torch.Tensor, routing: torch.Tensor,
    held: Experts, y: torch.Tensor, first: int, ranges: int, top_k: int, act: str, mean: int,
) -> None:  # fmt: skip
    w = held.down
    eights = isinstance(hidden, Terms)
    tile = _tile("experts_down", w, y.device, mean, eights)
    build.kernels(w.layout, eights=eights).experts_down[-(-w.rows // tile.rows), ranges](
        _taken(hidden), len(hidden), slots, routing, held.ids, counts, counts[1:], held.downs,
        w.planes[-1], y, first, counts.shape[1], len(held.ids), top_k, w.rows, w.columns, w.stride,
        **tile.constants, **tile.options, **_sizes(held, act),
    )  # fmt: skip


def _down_few(
    hidden: torch.Tensor, slots: torch.Tensor, edges: torch.Tensor, routing: torch.Tensor,
    held: Experts, work: Workspace, y: torch.Tensor, tokens: int, top_k: int, act: str, adds: bool,
) -> None:  # fmt: skip
    w, count = held.down, len(held.ids)
    tile = _tile("experts_down_few", w, y.device, tokens)
    tiles = -(-w.rows // tile.rows)
    parts = min(count, len(hidden), table.most_parts(tile, tiles, processors(y.device)))
    build.kernels(w.layout).experts_down_few[tiles, parts](
        hidden, slots, routing, held.ids, edges[:-1], edges[1:], held.downs, w.planes[-1], y,
        work.partials, work.counters, tokens, count, top_k, w.rows, w.columns, w.stride, parts,
        **tile.constants, **tile.options, **_sizes(held, act), ADDS=adds,
    )  # fmt: skip


def _sizes(held: Experts, act: str) -> dict[str, int | str]:
    count, width = held.table.shape
    return {"EXPERTS": 1 << (count - 1).bit_length(), "WIDTH": width, "BIAS": held.bias,
            "WEIGHED": weighs(act), "GATED": held.gated}  # fmt: skip


@cache
def arch(device: torch.device) -> int:
    """The architecture that kernels are chosen by, one of `table.SHARED`; where there is no GPU the
    first one."""
    if device.type != "cuda":
        return min(table.SHARED)
    major, minor = torch.cuda.get_device_capability(device)
    return table.known(10 * major + minor)


@cache
def processors(device: torch.device) -> int:
    """Its multiprocessors; where there is no GPU, a few."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
