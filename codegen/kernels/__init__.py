"""The table of kernels: for every op what makes IR text of a spec; here by `emit_<op>`, which is
handed the kernel under construction. What kernels mean in numpy, tests say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import ModuleType

from hmc.codegen.ir import Emitter
from hmc.codegen.kernels.attention import attention, block_index, index, pools, prefill, sparse
from hmc.codegen.kernels.compressed import attend, rows, window
from hmc.codegen.kernels.matmul import absorb, experts, gate_up, gemm, grouped, linear, screen
from hmc.codegen.kernels.pointwise import embed, hyper, norm, pointwise, rotary
from hmc.codegen.kernels.probes import nan_codes, peak, stream
from hmc.codegen.kernels.recurrent import conv, linear_attention, linear_prefill, scan
from hmc.codegen.kernels.routing import route, sort_experts
from hmc.codegen.pool import flags, resident_ids, walker
from hmc.codegen.spec import KernelSpec

_HOMES: Mapping[ModuleType, str] = {
    # The pool, the yardsticks, and what is read once when weights are opened.
    walker: "worker_loop pool_call read_tsc",
    stream: "stream_read stream_fill",
    peak: "dot_peak",
    nan_codes: "nan_codes",
    # Decode matmuls.
    linear: "linear",
    screen: "screen screen_tops screen_rows screen_copy",
    gate_up: "gate_up",
    experts: "experts_gate_up experts_down",
    # Many tokens (prefill).
    gemm: "gemm",
    grouped: "grouped_gate_up grouped_down",
    # What lies between the matmuls, and between CPU and devices.
    embed: "embed gather_rows",
    norm: "norm add_norm add",
    pointwise: "pointwise",
    rotary: "rotary position_scale",
    attention: (
        "kv_append attention attention_join mla_append mla_attention mla_attention_join mla_up"
    ),
    absorb: "mla_absorb",
    prefill: "attention_prefill mla_prefill",
    linear_attention: "linear_attention",
    linear_prefill: "linear_attention_prefill",
    conv: "conv",
    scan: "selective_scan",
    index: "index_append index_scores index_choose index_prefill",
    sparse: "mla_gather sparse_mla_prefill",
    pools: "pool_positions",
    block_index: "block_scores block_choose block_prefill",
    window: "window_append window_gather",
    rows: "compress compress_rows",
    attend: "attend_few attend_prefill",
    hyper: "hyper_weights hyper_in hyper_out hyper_copy",
    route: "route hash_route",
    sort_experts: "sort_experts",
    resident_ids: "resident_ids",
    flags: "flag_wait flag_set",
}


def _text(emit: Callable[[Emitter], None], spec: KernelSpec) -> str:
    e = Emitter(spec)
    emit(e)
    return e.finish()


EMITTERS: dict[str, Callable[[KernelSpec], str]] = {
    op: partial(_text, getattr(module, f"emit_{op}"))
    for module, ops in _HOMES.items()
    for op in ops.split()
}
