"""Weight formats: one row a format, from which everything else about it follows.

base.py        what a format and its planes are
plain.py, fp8.py, micro.py, whole.py, gguf.py    the rows
dialects.py                what configurations say of rows
table.py       all of them
layouts.py, arrange.py     planes that checkpoints lay out otherwise than kernels read them
decode.py, blocks.py       what stored planes mean
arrange.py, decode.py and blocks.py are in numpy and imported by themselves: nothing else needs it.
"""

from hmc.formats.base import (
    DTYPE_BITS,
    GROUP,
    WHOLE,
    WIDE,
    Described,
    Form,
    Format,
    Plane,
    Storage,
    forms,
    kernel_params,
    matrix_of,
    minifloats,
    named,
)
from hmc.formats.table import FORMATS, format_of, register, registered, told_by_dtype

__all__ = [
    "DTYPE_BITS",
    "FORMATS",
    "GROUP",
    "WHOLE",
    "WIDE",
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
    "named",
    "register",
    "registered",
    "told_by_dtype",
]
