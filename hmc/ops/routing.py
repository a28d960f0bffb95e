"""Which experts a token goes to, and tokens in the order of their experts."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Final

from hmc.codegen.spec import KernelSpec
from hmc.ops.row import Attrs, Op, Role, Use, WeightRole, Weights, attr, picked, spec

EPS: Final = 1e-20
"""What sums of weights are raised by where no family says otherwise."""


def _choosable(attrs: Attrs) -> bool:
    experts, top_k, groups, best = picked(
        attrs, "experts", "top_k", "groups", "top_groups"
    ).values()
    fits = top_k <= experts and int(attrs["scoring"]) < 6 and attrs.get("group_best", 1) in (1, 2)
    if not best:  # no groups
        return fits
    equal = groups > 0 and experts % groups == 0 and experts >= 2 * groups
    return fits and equal and best <= groups and top_k <= best * (experts // groups)


@dataclass(frozen=True)
class Routing:
    """How experts are chosen and weighed (codegen/kernels/routing/route.py tells the scorings)."""

    scoring: int
    normalise: bool
    groups: int
    top_groups: int
    group_best: int = 2
    factor: float = 1.0
    eps: float = EPS
    jitter: float = 0.0

    @staticmethod
    def of(attrs: Attrs) -> Routing:
        """That of a step's attributes; those that it does not have are as usual."""
        given = {each.name: attrs[each.name] for each in fields(Routing) if each.name in attrs}
        return Routing(**given)


def _per_expert(attrs: Attrs) -> tuple[int, ...]:
    return (int(attrs["experts"]),)


_SIZES = ("experts", "top_k", "scoring", "normalise", "groups", "top_groups")


def _route(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    sizes = picked(attrs, *_SIZES, *(["group_best"] if "group_best" in attrs else []))
    sizes |= {"eps": 1} if "eps" in attrs else {}
    sizes |= {"scaled": 1} if "scale" in weights else {}
    return (spec("route", use, sizes),)


def _hash_route(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    return (spec("hash_route", use, picked(attrs, *_HASH)),)


_HASH = ("experts", "top_k", "scoring", "normalise")

OPS: Final = (
    Op(
        "route",
        inputs=(Role("logits", "f32", attr("experts")),),
        outputs=(
            Role("ids", "i32", attr("top_k")),
            Role("routing", "f32", attr("top_k")),
        ),
        weights=(
            WeightRole("bias", _per_expert, optional=True, vector=True),
            WeightRole("scale", _per_expert, optional=True, vector=True),
        ),
        attrs={**dict.fromkeys(_SIZES, int), "factor": float},
        extra={"group_best": int, "eps": float, "jitter": float},
        possible=_choosable,
        kernels=_route,
        everywhere=True,  # so that nothing sorted has to travel
        triton=True,
        family="routing",
    ),
    Op(
        # as `route`, but the experts are those that a table has for the token's id
        "hash_route",
        inputs=(
            Role("logits", "f32", attr("experts")),
            Role("token", "i32", lambda attrs: 1, given="ids"),
        ),
        outputs=(
            Role("ids", "i32", attr("top_k")),
            Role("routing", "f32", attr("top_k")),
        ),
        weights=(WeightRole("table", lambda a: (int(a["vocab"]), int(a["top_k"]))),),
        attrs={**dict.fromkeys(_HASH, int), "vocab": int, "factor": float},
        possible=lambda a: int(a["top_k"]) <= int(a["experts"]) and int(a["scoring"]) in (0, 1, 5),
        kernels=_hash_route,
        everywhere=True,
        launches=lambda attrs, load: 8,
        captured=False,  # token ids come from the host
        family="routing",
    ),
    Op(
        "sort",
        inputs=(Role("ids", "i32"),),
        outputs=(Role("order", "i32"),),
        where="gpu",
        launches=lambda attrs, load: 1 if load.few else 3,  # counts, scans, places
        triton=True,
        family="routing",
    ),
)
