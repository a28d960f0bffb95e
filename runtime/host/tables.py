"""Small tables that kernels read besides weights: cosines and sines, f32 copies of vectors, index
arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from hmc.formats.base import WIDE
from hmc.formats.decode import Floats
from hmc.plan import Plan
from hmc.plan.model import ExpertRole
from hmc.runtime.weights.store import WeightStore


class Tables:
    """Made when first asked for, shared by all phases, kept until the executor goes."""

    def __init__(self, plan: Plan, store: WeightStore) -> None:
        self._plan, self._store = plan, store
        self._angles: dict[tuple[str, float, str | None], tuple[npt.NDArray[np.float32], ...]] = {}
        self._vectors: dict[str, npt.NDArray[np.float32]] = {}
        self._arrays: dict[tuple[str | int, ...], npt.NDArray[np.generic]] = {}
        self._made: dict[tuple[str, str], Sequence[npt.NDArray[np.generic]]] = {}

    def rotary(self, constant: str, factor: float, alpha: str | None = None) -> tuple[int, int]:
        """Addresses of cos and sin, f32 [max_context, dim / 2], both times `factor`; frequencies
        are those of the constant times the exponentials of a weight `alpha`, if any.

        Angles are products in f32, as the models were trained with; of them the nearest f32.
        """
        key = (constant, factor, alpha)
        if key not in self._angles:
            inverse = np.array(self._plan.constants[constant], np.float32)
            if alpha is not None:
                inverse = inverse * np.exp(self._store.vector(alpha).astype(np.float32))
            positions = np.arange(self._plan.limits.max_context, dtype=np.float32)
            angle = (positions[:, None] * inverse).astype(np.float64)
            self._angles[key] = tuple(
                f(angle).astype(np.float32) * np.float32(factor) for f in (np.cos, np.sin)
            )
        cos, sin = self._angles[key]
        return cos.ctypes.data, sin.ctypes.data

    def vector(self, name: str | None) -> int:
        """Address of a vector weight as f32: in place where it is stored so, else a copy; 0 for
        None.
        """
        if name is None:
            return 0
        if self._store.weight(name).planes[0].dtype == WIDE:
            return self._store.address(name)
        if name not in self._vectors:
            self._vectors[name] = self._store.vector(name)
        return int(self._vectors[name].ctypes.data)

    def by_column(
        self, name: str, rows: int, made: Callable[[Floats], Floats] = np.positive
    ) -> int:
        """Address of what is `made` of a weight of so many rows, f32, all first elements of rows
        before all second ones.
        """
        key = ("by column", name)
        if key not in self._arrays:
            matrix = made(self._store.vector(name)).reshape(rows, -1)
            self._arrays[key] = np.ascontiguousarray(matrix.T)
        return int(self._arrays[key].ctypes.data)

    def expert_vectors(self, layer: int, role: ExpertRole) -> int:
        """Address of a vector of each of a layer's experts, f32 [experts, n]; 0 where there are
        none.
        """
        if role not in self._store.expert_roles(layer):
            return 0
        key = ("vectors", layer, role)
        if key not in self._arrays:
            self._arrays[key] = self._store.expert_vectors(layer, role)
        return int(self._arrays[key].ctypes.data)

    def ones(self, count: int) -> int:
        """Address of so many f32 1."""
        return self.array(("ones", count), np.ones(count, np.float32))

    def array(self, key: tuple[str | int, ...], values: npt.NDArray[np.generic]) -> int:
        """Address of an array that records point at, kept alive under `key`; the first one given
        wins.
        """
        return int(self._arrays.setdefault(key, np.ascontiguousarray(values)).ctypes.data)

    def made(
        self, key: tuple[str, str], make: Callable[[], Sequence[npt.NDArray[np.generic]]]
    ) -> tuple[int, ...]:
        """Addresses of arrays that are made together when first asked for."""
        if key not in self._made:
            self._made[key] = make()
        return tuple(int(each.ctypes.data) for each in self._made[key])
