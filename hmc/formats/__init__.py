"""Weight formats: one row a format, from which everything else about it follows.

base.py        what a format and its planes are
plain.py, fp8_block.py, int4_group.py    the rows
table.py       all of them
decode.py      what stored planes mean, in numpy (imported by itself: nothing else here needs it)
"""

from hmc.formats.base import (
    DTYPE_BITS,
    GROUP,
    WHOLE,
    Described,
    Form,
    Format,
    Plane,
    Storage,
    forms,
    kernel_params,
    matrix_of,
    minifloats,
)
from hmc.formats.table import FORMATS, format_of, register, registered

__all__ = [
    "DTYPE_BITS",
    "FORMATS",
    "GROUP",
    "WHOLE",
    "Described",
    "Form",
    "Format",
    "Plane",
    "Storage",
    "format_of",
    "forms",
    "kernel_params",
    "matrix_of",
    "minifloats",
    "register",
    "registered",
]
