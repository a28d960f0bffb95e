"""Experts that lie in stacks, as published files have them (docs: `Experts.stacked`)."""

from __future__ import annotations

from collections.abc import Mapping

from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.views import View
from hmc.models.converted import converted

Stacks = Mapping[str, tuple[str, View]]
"""Where each role's weights of all experts lie: the tensor beside the block, and how."""


def stacked(
    experts: int,
    hidden: int,
    inner: int,
    *,
    gate_up: str = "gate_up_proj",
    down: str = "down_proj",
    interleaved: bool = False,
    transposed: bool = False,
    bias: bool = False,
) -> Stacks:
    """Where gate, up and down of `experts` are: gate and up in one tensor [experts, 2 inner,
    hidden], gate first or `interleaved` (gate's rows 0, 2, ...), down [experts, hidden, inner];
    `transposed`, all with their last two axes exchanged. With `bias` vectors of the same order,
    never transposed, in tensors of the same names and "_bias".
    """
    second, step = (1, 2) if interleaved else (inner, 1)
    both, back = (experts, 2 * inner, hidden), (experts, hidden, inner)
    if transposed:
        both, back = (experts, hidden, 2 * inner), (experts, inner, hidden)
    found = {
        "gate": (gate_up, View(both, 0, step, transposed)),
        "up": (gate_up, View(both, second, step, transposed)),
        "down": (down, View(back, transposed=transposed)),
    }
    if bias:
        found |= {
            "gate_bias": (f"{gate_up}_bias", View((experts, 2 * inner), 0, step)),
            "up_bias": (f"{gate_up}_bias", View((experts, 2 * inner), second, step)),
            "down_bias": (f"{down}_bias", View((experts, hidden))),
        }
    return found


def lie_apart(config: ModelConfig) -> bool:
    """Whether gate and up, which published stacks hold in one, and each expert's matrices are
    tensors of their own: as GGUF files are read.
    """
    return converted(config)


def apart(experts: int, hidden: int, inner: int, gate: str, up: str, down: str) -> Stacks:
    """Where gate, up and down of `experts` are that have a stack each, of these names: [experts,
    inner, hidden] twice and [experts, hidden, inner].
    """
    into, back = View((experts, inner, hidden)), View((experts, hidden, inner))
    return {"gate": (gate, into), "up": (up, into), "down": (down, back)}
