"""Which layers see all tokens and which a window of them, as configurations say it."""

from __future__ import annotations

from hmc.checkpoint.config import ModelConfig

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_types(config: ModelConfig, key: str = "", every: int = 1) -> tuple[str, ...]:
    """The type of each layer: `layer_types` of the configuration, else by `key` a number n, every
    n-th is full and the others slide (`every` where it is absent), or letters, L slides and G is
    full, over and over.
    """
    depth = config.require_int("num_hidden_layers")
    found = config.get_strs("layer_types")
    if found:
        if len(found) < depth or {*found} - {FULL, SLIDING}:
            wanted = f"must say {FULL} or {SLIDING} for each of {depth} layers"
            raise config.error("layer_types", wanted)
        return found[:depth]
    pattern = config.values.get(key)
    if isinstance(pattern, str):
        if not pattern or {*pattern} - {"L", "G"}:
            raise config.error(key, "must be a number, or letters L and G")
        return tuple(SLIDING if pattern[i % len(pattern)] == "L" else FULL for i in range(depth))
    every = config.get_int(key, every, minimum=1)
    return tuple(SLIDING if (index + 1) % every else FULL for index in range(depth))


def window(config: ModelConfig, layer_type: str) -> int:
    """Positions that a layer sees, its own included; 0: all."""
    return config.require_int("sliding_window", minimum=1) if layer_type == SLIDING else 0
