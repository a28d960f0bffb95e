"""Weights in device memory: which pieces of the host's one copy make a weight, how they are packed,
and matrices over packed bytes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch

from hmc.plan import ExpertWeights, Weight
from hmc.plan.memory import aligned
from hmc.plan.stored import forms_of
from hmc.runtime.device_ops.matmul import Expert, Matrix
from hmc.runtime.weights.store import BIASES, PROJECTIONS, WeightStore
from hmc.runtime.weights.torch_view import TORCH, view


@dataclass(frozen=True)
class Piece:
    """`nbytes` at a host address, and where they begin in the packed bytes."""

    address: int
    start: int
    nbytes: int


class Packed:
    """Weights or experts one after the other, every tensor at a multiple of 256 bytes.

    `pieces` say what to copy where, `nbytes` how much room that takes.
    """

    def __init__(self) -> None:
        self.pieces: list[Piece] = []
        self.nbytes = 0
        self._experts: tuple[int, ...] = ()
        self._placed: dict[Hashable, tuple[Weight | ExpertWeights, list[int]]] = {}

    @staticmethod
    def weights(store: WeightStore, names: Iterable[str]) -> Packed:
        """The weights named, in this order."""
        packed = Packed()
        for name in names:
            packed._put(name, store.weight(name), store.addresses(name))
        return packed

    @staticmethod
    def of_experts(store: WeightStore, layer: int, experts: Iterable[int]) -> Packed:
        """Experts of a layer, in this order; of each matrices, scales after each, and biases."""
        packed = Packed()
        packed._experts = tuple(experts)
        columns = {
            role: (store.experts(layer, role), store.expert_planes(layer, role))
            for role in store.expert_roles(layer)
        }
        for expert in packed._experts:
            for role, (weights, planes) in columns.items():
                packed._put((expert, role), weights, [int(places[expert]) for places in planes])
        return packed

    def __contains__(self, name: str) -> bool:
        return name in self._placed

    def matrix(self, key: Hashable, raw: torch.Tensor) -> Matrix:
        """A weight of two dimensions, by its name, over packed bytes `raw` u8 [nbytes]."""
        weight, _ = self._placed[key]
        rows, columns = weight.shape
        return Matrix(self._tensors(key, raw), weight.format, (rows, columns), weight.group)

    def vector(self, key: Hashable, raw: torch.Tensor) -> torch.Tensor:
        """A weight of one dimension, as stored."""
        return self._tensors(key, raw)[0]

    def experts(self, raw: torch.Tensor) -> dict[int, Expert]:
        """Every expert over packed bytes."""
        return {expert: self._expert(expert, raw) for expert in self._experts}

    def _expert(self, expert: int, raw: torch.Tensor) -> Expert:
        gate, up, down = (
            self.matrix((expert, role), raw) if (expert, role) in self._placed else None
            for role in PROJECTIONS
        )
        assert up is not None and down is not None
        biases = [(expert, role) for role in BIASES if (expert, role) in self._placed]
        return Expert(gate, up, down, tuple(self.vector(key, raw) for key in biases))

    def copies(self, raw: torch.Tensor) -> list[tuple[int, torch.Tensor]]:
        """Host address and target of every piece."""
        return [(p.address, raw[p.start : p.start + p.nbytes]) for p in self.pieces]

    def copies_of_experts(self, raw: torch.Tensor) -> dict[int, list[tuple[int, torch.Tensor]]]:
        """As `copies`, by expert."""
        every, each = self.copies(raw), len(self.pieces) // len(self._experts)
        return {e: every[at * each : (at + 1) * each] for at, e in enumerate(self._experts)}

    def fill(self, raw: torch.Tensor) -> None:
        """Copy every piece now."""
        for address, target in self.copies(raw):
            target.copy_(view(address, torch.uint8, (len(target),)))

    def _tensors(self, key: Hashable, raw: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The planes of a weight over the packed bytes."""
        weight, starts = self._placed[key]
        return tuple(
            raw[start : start + form.bytes].view(TORCH[form.kept]).view(form.shape)
            for start, form in zip(starts, forms_of(weight), strict=True)
        )

    def _put(self, key: Hashable, weight: Weight | ExpertWeights, addresses: Sequence[int]) -> None:
        starts = []
        for address, form in zip(addresses, forms_of(weight), strict=True):
            starts.append(self.nbytes)
            self.pieces.append(Piece(address, self.nbytes, form.bytes))
            self.nbytes += aligned(form.bytes)
        self._placed[key] = weight, starts
