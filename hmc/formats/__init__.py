"""Weight formats: one row a format, from which everything else about it follows.

base.py        what a format and its planes are
plain.py, fp8_block.py, int4_group.py    the rows
table.py       all of them
weights.py     the planes of a weight as a plan or a checkpoint has it
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
from hmc.formats.weights import expected_planes, forms_of

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
    "expected_planes",
    "format_of",
    "forms",
    "forms_of",
    "kernel_params",
    "matrix_of",
    "minifloats",
    "register",
    "registered",
]
