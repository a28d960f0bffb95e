"""Options of attention (kernel_meanings.py: `Options`) as its kernels take them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from kernel_calls import address, guarded, spec_of
from kernel_meanings import Options

from hmc.codegen.arguments import ARGS
from hmc.codegen.spec import KernelSpec

_GROWTH = "growth_every growth_from"
_PARAMS = {
    "attention": f"window chunk {_GROWTH}",
    "attention_join": "window chunk sinks",
    "attention_prefill": f"window chunk {_GROWTH} sinks",
    "mla_attention": _GROWTH,
    "mla_prefill": f"{_GROWTH} sinks",
    "mla_attention_join": "sinks",
}
GROWTH = Options(growth=0.3, growth_every=37, growth_from=1)
LATENT = replace(GROWTH, sinks=np.linspace(-3.0, 9.0, 71, dtype=np.float32))
"""What latent attention may be asked, all at once; `of_heads` cuts the sinks."""
OPTIONS: list[Options] = [
    Options(window=100),
    Options(window=1),
    Options(chunk=70),
    Options(softcap=2.5),
    GROWTH,
    Options(sinks=np.linspace(-3.0, 9.0, 71, dtype=np.float32)),
    Options(
        window=33,
        softcap=1.5,
        sinks=np.linspace(5.0, -5.0, 71, dtype=np.float32),
        growth=0.1,
        growth_every=64,
    ),
]
"""One at a time, and several; `of_heads` cuts the sinks."""

HEADS: list[dict[str, int]] = [
    {"heads": 12, "kv_heads": 1, "head_dim": 256, "v_dim": 256, "block": 32},
    {"heads": 7, "kv_heads": 1, "head_dim": 112, "v_dim": 80, "block": 32},
    {"heads": 48, "kv_heads": 1, "head_dim": 96, "v_dim": 64, "block": 32},
    {"heads": 4, "kv_heads": 2, "head_dim": 512, "v_dim": 512, "block": 32},
    {"heads": 10, "kv_heads": 2, "head_dim": 192, "v_dim": 128, "block": 32},
]
"""Sizes of published models."""


def of_heads(options: Options, heads: int) -> Options:
    """Options with a sink for each head, guarded."""
    sinks = options.sinks
    return replace(options, sinks=None if sinks is None else guarded(sinks[:heads]))


def option_spec(
    op: str, isa: str, params: dict[str, int], options: Options, weight: str = ""
) -> KernelSpec:
    """A kernel of attention with options."""
    given = {name: getattr(options, name) for name in _PARAMS[op].split()}
    if "sinks" in given:
        given["sinks"] = int(options.sinks is not None)
    chosen = {name: value for name, value in given.items() if value}
    cap = options.softcap
    expr = f"{cap} * tanh(score / {cap})" if cap and op != "attention_join" else ""
    return replace(spec_of(op, isa, params | chosen, weight), expr=expr)


def option_args(op: str, options: Options) -> dict[str, int | float]:
    """Arguments of options, 0 for those there are not."""
    given: dict[str, int | float] = {"sinks": address(options.sinks), "growth": options.growth}
    given |= {"chosen": 0, "chosen_stride": 0}
    names = {arg.name for arg in ARGS[op]}
    return {name: value for name, value in given.items() if name in names}
