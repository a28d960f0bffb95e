"""What every record of a plan is made of: the strict, frozen model, whole numbers, dtypes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from hmc.first_fault import FirstFault

DType = Literal["f32", "bf16", "i32"]
Count = Annotated[int, Field(ge=0)]
DTYPE_BYTES: dict[str, int] = {"f32": 4, "bf16": 2, "i32": 4}


class Frozen(FirstFault):
    """Immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)
