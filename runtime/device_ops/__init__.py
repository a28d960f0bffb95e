"""What each step of a schedule computes on a device, by PyTorch: the literal table
`DEVICE_OPS`.

An op function takes a phase's memory (`base.Bound`) and a step, and returns what the step does in a
call. It works on any device, keeps no order (that is the schedule's) and leaves the stream it is
launched on to the caller. Operands and roles are those of the table in hmc/plan/model.py.
"""

from __future__ import annotations

from hmc.runtime.device_ops import (
    attention,
    block_sparse,
    compressed,
    dense,
    exchange,
    latent,
    moe,
    pools,
    recurrent,
    sparse,
)
from hmc.runtime.device_ops.base import Bound, OpFunction, Work
from hmc.runtime.device_ops.default import by_reference

DEVICE_OPS: dict[str, OpFunction] = {
    "embed": dense.embed,
    "gather_rows": dense.gather_rows,
    "norm": dense.norm,
    "add": dense.add,
    "add_norm": dense.add_norm,
    "linear": dense.linear,
    "gate_up": dense.gate_up,
    "rotary": dense.rotary,
    "position_scale": dense.position_scale,
    "attention": attention.attention,
    "index_blocks": block_sparse.index_blocks,
    "sparse_attention": block_sparse.sparse_attention,
    "mla": latent.mla,
    "index": sparse.index,
    "index_pools": pools.index_pools,
    "sparse_mla": sparse.sparse_mla,
    "linear_attention": recurrent.linear_attention,
    "compressed_attention": compressed.compressed_attention,
    "route": moe.route,
    "hash_route": moe.hash_route,
    "sort": moe.sort,
    "experts": moe.experts,
    "copy": exchange.copy,
    "load": exchange.load,
    "kv_out": exchange.kv_out,
    "kv_in": exchange.kv_in,
    "all_gather": exchange.all_gather,
    "exchange": exchange.exchange,
    "split": exchange.split,
    "join": exchange.join,
}


__all__ = ["DEVICE_OPS", "Bound", "OpFunction", "Work", "by_reference"]
