"""One row an op: everything that hmc knows of it, in one place (see row.py).

matmul.py        linear, grouped_linear, gate_up, experts
screen.py        a linear that only chooses, by a compact copy
norms.py         embed, gather_rows, norm, add, add_norm
pointwise.py     arithmetic of rows and vectors, as an expression
attention.py     rotary, position_scale, attention, mla
block_sparse.py  index_blocks, sparse_attention
sparse.py        index, sparse_mla
compressed.py    compressed_attention
pools.py         index_pools
hyper.py         hyper_weights, hyper_in, hyper_out, hyper_copy
recurrent.py     conv, linear_attention, selective_scan
routing.py       route, hash_route, sort
moves.py         ops of schedules over several resources
table.py         all of them by name
"""

from hmc.ops.row import Attrs, Load, Op, Role, State, Stored, Use, WeightRole, Work, kept_by
from hmc.ops.table import OPS, SHARED_ATTRS, op_of

__all__ = [
    "OPS",
    "SHARED_ATTRS",
    "Attrs",
    "Load",
    "Op",
    "Role",
    "State",
    "Stored",
    "Use",
    "WeightRole",
    "Work",
    "kept_by",
    "op_of",
]
