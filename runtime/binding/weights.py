"""Weights in device memory: which pieces of the host's one copy make a weight, how they are packed,
and matrices over packed bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from hmc.plan import ExpertWeights, Format, Weight
from hmc.plan.memory import aligned, scale_form
from hmc.runtime.device_ops.matmul import Matrix
from hmc.runtime.weights.store import Role, WeightStore
from hmc.runtime.weights.torch_view import view

Expert = tuple[Matrix, Matrix, Matrix]
_ROLES: tuple[Role, ...] = ("gate", "up", "down")
_TORCH = {
    "fp8": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "f32": torch.float32,
    "int4": torch.int32,
}


@dataclass(frozen=True)
class Piece:
    """`nbytes` at a host address, and where they begin in the packed bytes."""

    address: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class _Form:
    """Format and shape of a tensor and of its scales as they are in memory."""

    format: Format
    shape: tuple[int, ...]
    group: int
    nbytes: int
    scale: torch.dtype | None
    scale_shape: tuple[int, ...]

    @staticmethod
    def of(weight: Weight | ExpertWeights) -> _Form:
        size, *shape = scale_form(weight)
        scale = {0: None, 2: torch.bfloat16, 4: torch.float32}[size]
        return _Form(weight.format, weight.shape, weight.group, weight.bytes, scale, tuple(shape))

    @property
    def scale_bytes(self) -> int:
        if self.scale is None:
            return 0
        return self.scale.itemsize * self.scale_shape[0] * self.scale_shape[1]

    def tensor(self, raw: torch.Tensor) -> torch.Tensor:
        """The stored tensor over the bytes at the beginning of `raw`."""
        shape = self.shape
        if self.format == "int4":
            shape = (shape[0], self.nbytes // 4 // shape[0])
        return raw[: self.nbytes].view(_TORCH[self.format]).view(shape)

    def matrix(self, raw: torch.Tensor, scale: torch.Tensor) -> Matrix:
        """The matrix over the bytes at the beginning of `raw` and `scale`."""
        rows, columns = self.shape
        factors = None
        if self.scale is not None:
            factors = scale[: self.scale_bytes].view(self.scale).view(self.scale_shape)
        return Matrix(self.tensor(raw), self.format, (rows, columns), factors, self.group)


class Packed:
    """Weights or experts one after the other, every tensor at a multiple of 256 bytes.

    `pieces` say what to copy where, `nbytes` how much room that takes.
    """

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.nbytes = 0
        self._weights: dict[str, tuple[_Form, int, int]] = {}
        self._experts: dict[int, tuple[tuple[_Form, int, int], ...]] = {}
        self._of_expert: dict[int, slice] = {}

    @staticmethod
    def weights(store: WeightStore, names: Iterable[str]) -> Packed:
        """The weights named, in this order."""
        packed = Packed()
        for name in names:
            addresses = store.address(name), store.scale_address(name)
            packed._weights[name] = packed._put(_Form.of(store.weight(name)), *addresses)
        return packed

    @staticmethod
    def of_experts(store: WeightStore, layer: int, experts: Iterable[int]) -> Packed:
        """Experts of a layer, in this order; of each gate, up and down, scales after each."""
        packed = Packed()
        forms = [_Form.of(store.experts(layer, role)) for role in _ROLES]
        table = store.expert_table(layer)
        for expert in experts:
            row = table[expert].tolist()
            first = len(packed.pieces)
            packed._experts[expert] = tuple(
                packed._put(form, row[2 * i], row[2 * i + 1]) for i, form in enumerate(forms)
            )
            packed._of_expert[expert] = slice(first, len(packed.pieces))
        return packed

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def matrix(self, name: str, raw: torch.Tensor) -> Matrix:
        """A weight of two dimensions over packed bytes `raw` u8 [nbytes]."""
        form, data, scale = self._weights[name]
        return form.matrix(raw[data:], raw[scale:])

    def vector(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        """A weight of one dimension, as stored."""
        form, data, _ = self._weights[name]
        return form.tensor(raw[data:])

    def experts(self, raw: torch.Tensor) -> dict[int, Expert]:
        """gate, up and down of every expert over packed bytes."""
        return {
            expert: (
                gate[0].matrix(raw[gate[1] :], raw[gate[2] :]),
                up[0].matrix(raw[up[1] :], raw[up[2] :]),
                down[0].matrix(raw[down[1] :], raw[down[2] :]),
            )
            for expert, (gate, up, down) in self._experts.items()
        }

    def copies(self, raw: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """Host address and target of every piece."""
        return [(p.address, raw[p.start : p.start + p.nbytes]) for p in self.pieces]

    def copies_of_experts(self, raw: torch.Tensor) -> dict[int, list[tuple[int, torch.Tensor]]]:
        """As `copies`, by expert."""
        every = self.copies(raw)
        return {expert: every[pieces] for expert, pieces in self._of_expert.items()}

    def fill(self, raw: torch.Tensor) -> None:
        """Copy every piece now."""
        for address, target in self.copies(raw):
            target.copy_(view(address, torch.uint8, (len(target),)))

    def _put(self, form: _Form, data: int, scale: int) -> tuple[_Form, int, int]:
        places = []
        for address, size in ((data, form.nbytes), (scale, form.scale_bytes)):
            places.append(self.nbytes)
            if size:
                self.pieces.append(Piece(address, self.nbytes, size))
                self.nbytes += aligned(size)
        return form, places[0], places[1]


Residents = Mapping[int, tuple[Packed, torch.Tensor]]
"""By layer, the experts a device holds and their bytes."""
