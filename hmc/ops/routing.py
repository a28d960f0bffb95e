"""Which experts a token goes to, and tokens in the order of their experts."""

from __future__ import annotations

from typing import Final

from hmc.ops.row import Attrs, Op, Role, WeightRole, attr, one_kernel, picked


def _choosable(attrs: Attrs) -> bool:
    experts, top_k, groups, best = picked(
        attrs, "experts", "top_k", "groups", "top_groups"
    ).values()
    fits = top_k <= experts and int(attrs["scoring"]) < 3
    if not best:  # no groups
        return fits
    equal = groups > 0 and experts % groups == 0 and experts >= 2 * groups
    return fits and equal and best <= groups and top_k <= best * (experts // groups)


OPS: Final = (
    Op(
        "route",
        inputs=(Role("logits", "f32", attr("experts")),),
        outputs=(
            Role("ids", "i32", attr("top_k")),
            Role("routing", "f32", attr("top_k")),
        ),
        weights=(
            WeightRole("bias", lambda attrs: (int(attrs["experts"]),), optional=True, vector=True),
        ),
        attrs={
            **dict.fromkeys(("experts", "top_k", "scoring", "normalise"), int),
            **dict.fromkeys(("groups", "top_groups"), int),
            "factor": float,
        },
        possible=_choosable,
        kernels=one_kernel(
            "route", "experts", "top_k", "scoring", "normalise", "groups", "top_groups"
        ),
        everywhere=True,  # so that nothing sorted has to travel
        triton=True,
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
