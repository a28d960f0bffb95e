"""What an op is (`Op`): the one place that says what it reads, writes, keeps, costs and is computed
by. A row is data and small pure functions of attributes; nothing here loads torch or numpy.

Everything else asks the row: the graph's nodes and the plan's steps, the verifier, the cost model,
the cache's layout, what streams and what stays, which kernels run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeVar

from hmc.codegen.spec import KernelSpec
from hmc.formats import format_of, kernel_params

Attrs = Mapping[str, Any]
"""Attributes of a node or step by name."""
Size = Callable[[Attrs], int]
Family = Literal["attention", "experts", "dense matmuls", "routing", "norms and sums", "transfers"]
Where = Literal["any", "host", "cpu", "gpu", "h2d", "d2h", "h2d d2h", "link"]

FLOATS = "f32 bf16"
PAGED = "flashinfer"
"""The library that may attend for GPUs where each token is a sequence's, over pages of caches."""
FEW = 16
"""Most tokens of a call for which GPUs read weights as fast as memory gives them."""


@dataclass(frozen=True)
class Role:
    """An operand: rows of a buffer whose dtype is one of the words of `dtype`, or of the attribute
    of that name. Native kernels read and write the first.

    `width` is elements a row (None: as wide as what it is copied from or to). `rows`: one a token
    that the step works on, one a token of the whole call also where ranks share it, or one a row
    whose logits are wanted. `given` names the engine's own array that an input is always bound to.
    An output that is `in_place` is the input of that name. A role that is `many` stands for name0,
    name1, ..., and "*" for any name.
    """

    name: str
    dtype: str
    width: Size | None = None
    rows: Literal["tokens", "all", "wanted"] = "tokens"
    optional: bool = False
    given: str = ""
    in_place: str = ""
    many: bool = False

    def dtypes(self, attrs: Attrs) -> tuple[str, ...]:
        """What the buffer's dtype may be."""
        return tuple(str(attrs.get(self.dtype, self.dtype)).split())


@dataclass(frozen=True)
class WeightRole:
    """A weight: `shape` as stored, of one expert where there is one an `expert`.

    A `matmul` operand is what quantised checkpoints store in few bits, and what FLOPs are counted
    of; others are stored plain. Kernels read a `vector` in f32, whatever it is stored in.
    """

    name: str
    shape: Callable[[Attrs], tuple[int, ...]]
    optional: bool = False
    expert: bool = False
    matmul: bool = False
    vector: bool = False
    many: bool = False


@dataclass(frozen=True)
class State:
    """What a layer keeps between calls: `width` elements of `dtype` a token (in pages) or a
    sequence (in a slot). With a `window` only that many positions are ever read again.
    """

    name: str
    width: int
    per: Literal["token", "sequence"] = "token"
    dtype: Literal["bf16", "f32"] = "bf16"
    window: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of a token or sequence in one layer."""
        return self.width * (4 if self.dtype == "f32" else 2)


@dataclass(frozen=True)
class Stored:
    """How a weight lies in memory, as far as kernels must know: its format there, and the `params`
    of it that are compiled into a kernel (`hmc.formats.kernel_params`).
    """

    format: str
    params: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def of(form: str, group: int, dtypes: Iterable[str]) -> Stored:
        """The stored form of a weight with planes of these dtypes."""
        row = format_of(form)
        return Stored(row.kernels, tuple(kernel_params(row, group, dtypes).items()))

    @property
    def sizes(self) -> dict[str, int]:
        """`params` by name."""
        return dict(self.params)


@dataclass(frozen=True)
class Use:
    """What a kernel is wanted for: a tier, calls of up to `tokens` tokens or of any number (0),
    pages of `block` tokens.
    """

    isa: str
    tokens: int
    block: int

    @property
    def many(self) -> bool:
        """Whether calls have any number of tokens."""
        return self.tokens == 0


Weights = Mapping[str, Stored]
"""Stored form by weight role."""
Kernels = Callable[[Attrs, Weights, Use], tuple[KernelSpec, ...]]


@dataclass(frozen=True)
class Load:
    """What one step has to do in a call: `rows` it works on, of a call of `tokens` tokens, of
    `sequences` sequences with `context` tokens before; attention sees the tokens of `ranks` times
    as many. `lifted`: latent attention runs with keys and values of every head.
    """

    rows: float
    tokens: float
    sequences: float = 1
    context: float = 0
    ranks: int = 1
    lifted: bool = False

    @property
    def few(self) -> bool:
        """Whether kernels of a few tokens, one or so of a sequence, do it."""
        return self.tokens <= FEW


@dataclass(frozen=True)
class Work:
    """What a step does, in multiples of what one token's step holds: its weights are read `reads`
    times and multiplied by `products` rows. Beside that `scores` FLOPs of attention over `keys`
    cache rows, and `moved` bytes of activations (None: its operands, once each). `pieces` separate
    matrices are begun and ended. `made` bytes of temporaries are written and read on a GPU.
    """

    reads: float
    products: float
    scores: float = 0.0
    keys: float = 0.0
    moved: float | None = None
    pieces: float = 0.0
    made: float = 0.0


def kept_by(attrs: Attrs, layer: int) -> int:
    """The layer whose states a step of `layer` reads: its own, or the earlier one that it names."""
    return int(attrs.get("source", layer))


def once(attrs: Attrs, load: Load) -> Work:
    """Weights are read once whatever the rows: every dense op."""
    return Work(1.0, load.rows)


def one_launch(attrs: Attrs, load: Load) -> int:
    """One kernel, whatever the rows."""
    return 1


def no_states(attrs: Attrs) -> tuple[State, ...]:
    """Nothing is kept between calls."""
    return ()


def no_kernels(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    """The host never computes it natively."""
    return ()


@dataclass(frozen=True)
class Op:
    """A row. `attrs` are the attributes it must have, with their types, `extra` those that it may
    have; nothing else is accepted, and they must be `possible` together: what kernels take for
    granted and no width or shape says. `kernels` chooses native kernels in launch order.

    `where` it may run: a table that stays with the host's memory ("host"), the CPU alone ("cpu"), a
    transfer ("h2d", "d2h", "link"), or any device. `triton`: GPUs have a kernel of hmc's for it
    (codegen/triton). `paged` says what of a step with these attributes and weights the library of
    paged attention does not compute, "" where it computes all. `launches` of kernels a GPU needs
    for a call, `captured` whether they depend on the host by numbers of rows alone, so that a graph
    may hold them; `everywhere`: on several ranks each computes it for all tokens; `always`: it does
    something even for no rows; `alone`: what it keeps is more than rows of its operands, so that
    no several GPUs share its prompts, and the host's cache is handed none of it.
    Where attributes say which of the optional inputs and weights there are, `named` tells them.
    """

    name: str
    inputs: tuple[Role, ...]
    outputs: tuple[Role, ...]
    family: Family
    weights: tuple[WeightRole, ...] = ()
    attrs: Mapping[str, type] = field(default_factory=dict)
    extra: Mapping[str, type] = field(default_factory=dict)
    possible: Callable[[Attrs], bool] = lambda attrs: True
    kernels: Kernels = no_kernels
    states: Callable[[Attrs], tuple[State, ...]] = no_states
    work: Callable[[Attrs, Load], Work] = once
    where: Where = "any"
    launches: Callable[[Attrs, Load], int] = one_launch
    triton: bool = False
    paged: Callable[[Attrs, Collection[str]], str] | None = None
    captured: bool = True
    named: Callable[[Attrs], Collection[str]] | None = None
    everywhere: bool = False
    always: bool = False
    alone: bool = False

    @cached_property
    def attends(self) -> bool:
        """Whether layers keep something for it between calls."""
        return self.states is not no_states

    def pages(self, attrs: Attrs) -> bool:
        """Whether a layer keeps something a token for it, as all kinds of attention do."""
        return any(state.per == "token" for state in self.states(attrs))

    @cached_property
    def routed(self) -> bool:
        """Whether its weights are one an expert."""
        return any(weight.expert for weight in self.weights)

    @cached_property
    def has_matmul(self) -> bool:
        """Whether it multiplies matrices of its own with its rows."""
        return any(weight.matmul for weight in self.weights)

    @property
    def matmul(self) -> bool:
        """Whether these are dense."""
        return self.has_matmul and not self.routed

    @cached_property
    def moves(self) -> bool:
        """Whether it computes nothing: it moves rows or weights."""
        return self.family == "transfers"

    @cached_property
    def native(self) -> bool:
        """Whether the host computes it by native kernels."""
        return self.kernels is not no_kernels

    def device_kernel(self, attrs: Attrs, maker: str = "triton") -> str:
        """What a step names as its kernel where the host's own do not compute it: hmc's Triton
        kernel, or another `maker`'s, with its sizes, else what PyTorch does.
        """
        if not self.triton:
            return "torch:copy" if self.where in ("h2d", "d2h") else f"torch:{self.name}"
        sizes = (f"{name}{attrs[name]}" for name, kind in self.attrs.items() if kind is int)
        return "-".join((f"{maker}:{self.name}", *sizes))

    @cached_property
    def loads(self) -> bool:
        """Whether it brings weights into slots."""
        return self.moves and self.where == "h2d"

    @cached_property
    def picks(self) -> bool:
        """Whether it picks the rows whose logits are wanted: what follows works on these."""
        return any(role.rows == "wanted" for role in self.outputs)

    @cached_property
    def loose(self) -> bool:
        """Whether what it writes is as wide as what it reads, whatever that is."""
        return any(role.width is None for role in self.outputs)

    @cached_property
    def many(self) -> bool:
        """Whether it has operands for each of several ranks or lanes."""
        return any(role.many for role in (*self.inputs, *self.outputs))

    @property
    def graph_inputs(self) -> tuple[Role, ...]:
        """The inputs that come from other nodes of a graph, in order."""
        return tuple(role for role in self.inputs if not role.given)

    def key(self, spec: KernelSpec) -> str:
        """A readable name of one of its kernels, unique within a plan (one tier): kernel, format
        and sizes, e.g. `linear-fp8-k2048-tokens16`; with the result's dtype where it has several,
        and a digest of an expression that is compiled in.
        """
        sizes = [f"{name}{'_' * name[-1].isdigit()}{value}" for name, value in spec.params]
        out = spec.out if "out" in self.attrs else ""
        compiled = hashlib.sha256(spec.expr.encode()).hexdigest()[:6] if spec.expr else ""
        return "-".join(filter(None, [spec.op, spec.weight, out, *sizes, compiled]))

    def read(self, attrs: Attrs) -> tuple[Role, ...]:
        """Those of `graph_inputs` that attributes call for, or may."""
        names = None if self.named is None else self.named(attrs)
        return tuple(role for role in self.graph_inputs if names is None or role.name in names)

    def weight(self, name: str) -> WeightRole | None:
        """The weight role of a name, as `role_named`."""
        return role_named(self.weights, name)


_AnyRole = TypeVar("_AnyRole", Role, WeightRole)


def role_named(roles: tuple[_AnyRole, ...], name: str) -> _AnyRole | None:
    """The role of a name among `roles`, numbered ones by their stem; None when there is none."""
    stem = name.rstrip("0123456789")
    for role in roles:
        if role.name in (name, "*") or (role.many and role.name == stem and stem != name):
            return role
    return None


def attr(name: str) -> Size:
    """A width that is an attribute."""
    return lambda attrs: int(attrs[name])


def product(*names: str) -> Size:
    """A width that is the product of attributes."""

    def size(attrs: Attrs) -> int:
        total = 1
        for name in names:
            total *= int(attrs[name])
        return total

    return size


def spec(
    op: str,
    use: Use,
    sizes: Mapping[str, int],
    weight: str = "",
    out: str = "f32",
    expr: str = "",
) -> KernelSpec:
    """A kernel of a tier with sizes in canonical order."""
    return KernelSpec(op, use.isa, weight, out, tuple(sorted(sizes.items())), expr=expr)


def one_kernel(op: str, *sizes: str, weight: str = "", out: str = "f32") -> Kernels:
    """One kernel however many tokens a call has, of attributes `sizes` and the stored form of a
    `weight`; `out` is its dtype, or the attribute that says it.
    """

    def kernels(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
        stored = weights[weight].format if weight else ""
        return (spec(op, use, picked(attrs, *sizes), stored, str(attrs.get(out, out))),)

    return kernels


def picked(attrs: Attrs, *names: str) -> dict[str, int]:
    """Some attributes as whole numbers."""
    return {name: int(attrs[name]) for name in names}
