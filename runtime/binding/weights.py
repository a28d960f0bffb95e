"""Weights in device memory: which pieces of the host's one copy make a weight, how they are packed,
and matrices over packed bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hmc.formats import forms_of
from hmc.plan import ExpertWeights, Weight
from hmc.plan.memory import aligned
from hmc.runtime.device_ops.matmul import Matrix
from hmc.runtime.weights.store import Role, WeightStore
from hmc.runtime.weights.torch_view import TORCH, view

Expert = tuple[Matrix, Matrix, Matrix]
_ROLES: tuple[Role, ...] = ("gate", "up", "down")


@dataclass(frozen=True)
class Piece:
    """`nbytes` at a host address, and where they begin in the packed bytes."""

    address: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class _Placed:
    """A weight and where each of its planes begins in packed bytes."""

    weight: Weight | ExpertWeights
    starts: tuple[int, ...]

    def tensors(self, raw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Its planes over the packed bytes."""
        return tuple(
            raw[start : start + form.bytes].view(TORCH[form.kept]).view(form.shape)
            for start, form in zip(self.starts, forms_of(self.weight), strict=True)
        )

    def matrix(self, raw: torch.Tensor) -> Matrix:
        """The matrix over the packed bytes."""
        rows, columns = self.weight.shape
        return Matrix(self.tensors(raw), self.weight.format, (rows, columns), self.weight.group)


class Packed:
    """Weights or experts one after the other, every tensor at a multiple of 256 bytes.

    `pieces` say what to copy where, `nbytes` how much room that takes.
    """

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.nbytes = 0
        self._weights: dict[str, _Placed] = {}
        self._experts: dict[int, tuple[_Placed, _Placed, _Placed]] = {}
        self._of_expert: dict[int, slice] = {}

    @staticmethod
    def weights(store: WeightStore, names: Iterable[str]) -> Packed:
        """The weights named, in this order."""
        packed = Packed()
        for name in names:
            packed._weights[name] = packed._put(store.weight(name), store.addresses(name))
        return packed

    @staticmethod
    def of_experts(store: WeightStore, layer: int, experts: Iterable[int]) -> Packed:
        """Experts of a layer, in this order; of each gate, up and down, scales after each."""
        packed = Packed()
        columns = [
            (store.experts(layer, role), store.expert_planes(layer, role)) for role in _ROLES
        ]
        for expert in experts:
            first = len(packed.pieces)
            gate, up, down = (
                packed._put(weights, tuple(int(places[expert]) for places in planes))
                for weights, planes in columns
            )
            packed._experts[expert] = gate, up, down
            packed._of_expert[expert] = slice(first, len(packed.pieces))
        return packed

    def __contains__(self, name: str) -> bool:
        return name in self._weights

    def matrix(self, name: str, raw: torch.Tensor) -> Matrix:
        """A weight of two dimensions over packed bytes `raw` u8 [nbytes]."""
        return self._weights[name].matrix(raw)

    def vector(self, name: str, raw: torch.Tensor) -> torch.Tensor:
        """A weight of one dimension, as stored."""
        return self._weights[name].tensors(raw)[0]

    def experts(self, raw: torch.Tensor) -> dict[int, Expert]:
        """gate, up and down of every expert over packed bytes."""
        return {
            expert: (gate.matrix(raw), up.matrix(raw), down.matrix(raw))
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

    def _put(self, weight: Weight | ExpertWeights, addresses: tuple[int, ...]) -> _Placed:
        starts = []
        for address, form in zip(addresses, forms_of(weight), strict=True):
            starts.append(self.nbytes)
            self.pieces.append(Piece(address, self.nbytes, form.bytes))
            self.nbytes += aligned(form.bytes)
        return _Placed(weight, tuple(starts))
