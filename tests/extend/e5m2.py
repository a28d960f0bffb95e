"""A weight format added to hmc from outside: FP8 E5M2 with one scale a row. Its row is all that hmc
has to be told; decoders are chosen, or made from its planes, by what it says.
"""

from __future__ import annotations

from hmc.formats import WHOLE, Described, Format, Plane, Storage, minifloats


def _find_e5m2(described: Described) -> Storage | None:
    if described.method != "fp8" or described.whole.get_str("fmt", "") != "e5m2":
        return None
    return Storage("e5m2_rows", ("", "_scale_inv"))


E5M2_ROWS = Format(
    name="e5m2_rows",
    title="FP8 E5M2",
    planes=(
        Plane("codes", ("F8_E5M2",)),
        Plane("scale", ("F32", "BF16"), ("_scale_inv",), columns=WHOLE, kept=("F32",)),
    ),
    exact_in=("bf16", "f32"),
    about="FP8 E5M2, one {scale} scale a row",
    values=minifloats(5, 2, infinities=True),
    find=_find_e5m2,
)
