"""A parameter found in a checkpoint: the tensors of its planes, its format, and why that one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hmc.checkpoint.headers import TensorInfo
from hmc.checkpoint.quantization import Quantization
from hmc.checkpoint.views import Pick
from hmc.formats import Format, Storage, matrix_of, named

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Some of the rows of a weight [N, K], `rows` of every head: a tensor [heads, rows, K], or,
    `transposed`, [heads, K, rows].
    """

    tensor: TensorInfo
    rows: int
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class WeightSource:
    """A parameter found: the `tensors` of its planes, in the order of its format's row.

    `group` is the number of columns that share a scale, where the format leaves that open, else 0;
    `beside` names tensors that belong to it and hold nothing that is needed; `note` is the reason
    for the format, in a few words for a plan. Where the only plane does not lie in one tensor,
    `parts` are those that it is put together from when weights are opened, and its own place is
    that of the first. Where planes are picked from the rows of larger ones, `picks` say so, one of
    each plane; their places are those of the larger ones.
    """

    name: str
    shape: Shape
    format: str
    group: int
    tensors: tuple[TensorInfo, ...]
    beside: tuple[str, ...]
    note: str
    parts: tuple[Part, ...] = ()
    picks: tuple[Pick | None, ...] = ()

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Stored dtype of each plane."""
        return tuple(tensor.dtype for tensor in self.tensors)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the checkpoint's tensors that this weight accounts for."""
        return (*(tensor.name for tensor in self.tensors), *self.beside)

    @property
    def nbytes(self) -> int:
        """Stored bytes of all planes."""
        return sum(tensor.nbytes for tensor in self.tensors)


def coded(
    row: Format, storage: Storage, name: str, shape: Shape, tensors: Sequence[TensorInfo]
) -> WeightSource:
    """A weight that lies in codes and scales, as `storage` says."""
    group = group_of(storage, shape)
    note = row.note(group, [tensor.dtype for tensor in tensors])
    beside = tuple(named(name, suffix) for suffix, _, _ in storage.beside)
    return WeightSource(name, shape, row.name, group, tuple(tensors), beside, note)


def group_of(storage: Storage, shape: Shape) -> int:
    """Columns of a weight of `shape` that share a scale; a group of -1 is all of a row."""
    if len(shape) != 2:
        raise ValueError(f"a linear weight has two dimensions, one was asked for as {shape}")
    return matrix_of(shape)[1] if storage.group < 0 else storage.group


def cut_groups(row: Format, group: int, shape: Shape) -> str:
    """What is wrong where rows are not whole groups and must be, else ""."""
    _, columns = matrix_of(shape)
    if row.whole_groups(columns, group):
        return ""
    if row.codes.block[1]:
        return f"has {columns} input columns, no multiple of the block of {row.codes.block[0]}"
    return f"has {columns} input columns, no multiple of group_size {group}"


def plain_note(dtype: str, linear: bool, quantization: Quantization, name: str) -> str:
    """Why a weight is stored as it is."""
    if not quantization.storages:
        return f"{dtype}: the checkpoint is not quantised"
    if not linear:
        return f"{dtype}: not the weight of a linear layer"
    if quantization.skips(module_of(name)):
        return (
            f"{dtype}: listed in {quantization.skip_key or 'the default of modules_to_not_convert'}"
        )
    if not quantization.storages_of(module_of(name)):
        return f"{dtype}: no target of the configuration"
    return f"{dtype}: stored unquantised, though no list says so"


def module_of(name: str) -> str:
    """The module of a weight: what configurations name."""
    return name.removesuffix(".weight")
