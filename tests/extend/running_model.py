"""A random checkpoint of the family in running.py, and what is asked of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from running import CONFIG, NAME
from safetensors.torch import save_file

from hmc.checkpoint.config import load_config
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.models import load, weight_specs
from hmc.plan import Plan
from hmc.runtime.tokens.generation import Ends
from hmc.runtime.tokens.requests import Request
from hmc.runtime.tokens.sampler import Sampler, SamplingParams
from hmc.runtime.tokens.text import StopStrings


def write(found: Path) -> None:
    """A checkpoint in bf16, the op being known."""
    (found / "config.json").write_text(json.dumps(CONFIG))
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, spec in sorted(weight_specs(load(load_config(found)).module).items()):
        for each in [name.format(e=e) for e in range(spec.experts)] or [name]:
            noise = torch.randn(spec.shape, generator=generator)
            gain = 1.0 if name.endswith("embed_tokens.weight") else 1 / math.sqrt(spec.shape[-1])
            values = 1 + 0.1 * noise if noise.ndim == 1 else gain * noise
            tensors[each] = values.to(torch.bfloat16)
    save_file(tensors, found / "model.safetensors", {"format": "pt"})


def built(plan: Plan) -> Plan:
    """The plan, with those kernels in the cache that processes which build others do not know."""
    jit = Jit(EMITTERS)
    for kernel in plan.kernels.values():
        if kernel.op == NAME:
            jit.object_code(kernel)
    return plan


def ids_of(tokens: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(2, CONFIG["vocab_size"], tokens).tolist()


def request(ids: list[int], new: int) -> Request:
    ends = Ends(new, (CONFIG["eos_token_id"],), StopStrings(None))
    return Request(np.array(ids, np.int32), Sampler(SamplingParams(), ids), ends)
