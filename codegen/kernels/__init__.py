"""The table of kernels: for every op its emitter and, beside it, its meaning in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hmc.codegen.kernels.attention import attention, mla, mla_prefill, prefill_attention
from hmc.codegen.kernels.matmul import experts, gate_up, gemm, grouped, linear
from hmc.codegen.kernels.pointwise import embed, norm, pointwise, rotary
from hmc.codegen.kernels.probes import nan_codes, peak, stream
from hmc.codegen.kernels.routing import route, sort_experts
from hmc.codegen.pool import flags, resident_ids
from hmc.codegen.pool.walker import emit_pool_call, emit_read_tsc, emit_worker_loop
from hmc.codegen.spec import KernelSpec

EMITTERS: dict[str, Callable[[KernelSpec], str]] = {}

REFERENCES: dict[str, Callable[..., Any]] = {}

# The pool, the yardsticks, and what is read once when weights are opened.
EMITTERS |= {
    "worker_loop": emit_worker_loop,
    "pool_call": emit_pool_call,
    "read_tsc": emit_read_tsc,
    "stream_read": stream.emit_stream_read,
    "stream_fill": stream.emit_stream_fill,
    "dot_peak": peak.emit_dot_peak,
    "nan_codes": nan_codes.emit_nan_codes,
}
REFERENCES |= {
    "stream_read": stream.stream_read,
    "stream_fill": stream.stream_fill,
    "dot_peak": peak.dot_peak,
    "nan_codes": nan_codes.nan_codes,
}

# Decode matmuls.
EMITTERS |= {
    "linear": linear.emit_linear,
    "gate_up": gate_up.emit_gate_up,
    "experts_gate_up": experts.emit_experts_gate_up,
    "experts_down": experts.emit_experts_down,
}
REFERENCES |= {
    "linear": linear.linear,
    "gate_up": gate_up.gate_up,
    "experts_gate_up": experts.experts_gate_up,
    "experts_down": experts.experts_down,
}

# Many tokens (prefill).
EMITTERS |= {
    "gemm": gemm.emit_gemm,
    "grouped_gate_up": grouped.emit_grouped_gate_up,
    "grouped_down": grouped.emit_grouped_down,
}
REFERENCES |= {
    "gemm": gemm.gemm,
    "grouped_gate_up": experts.experts_gate_up,
    "grouped_down": experts.experts_down,
}

# What lies between the matmuls, and between CPU and devices.
for _module in (
    *(embed, norm, pointwise, rotary, attention, prefill_attention, mla, mla_prefill),
    *(route, sort_experts, resident_ids),
    flags,
):
    EMITTERS |= _module.EMITTERS
    REFERENCES |= _module.REFERENCES
