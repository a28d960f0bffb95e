"""What GGUF files call the parts of layers that keep states, and say of them."""

from __future__ import annotations

from hmc.checkpoint.gguf.families import Facts, Flat, Names


def state_names(prefix: str) -> Names:
    """Mixers whose parts are called `prefix` and more. What they call A_log is -exp of it, as
    configurations tell by `APART` (hmc/models/converted.py).
    """
    return {
        "blk.{n}.ssm_a": prefix + "A_log",
        "blk.{n}.ssm_d": prefix + "D",
        "blk.{n}.ssm_dt.bias": prefix + "dt_bias",
        "blk.{n}.ssm_conv1d": prefix + "conv1d",
        "blk.{n}.ssm_in": prefix + "in_proj",
        "blk.{n}.ssm_norm": prefix + "norm",
        "blk.{n}.ssm_out": prefix + "out_proj",
    }


def by_groups(prefix: str) -> dict[str, Flat]:
    """The norm of Mamba 2, which lies group by group."""
    return {"blk.{n}.ssm_norm.weight": Flat(prefix + "norm.weight")}


def attending(facts: Facts, tensor: str = "attn_k.weight") -> list[bool]:
    """Whether each layer attends to all tokens, as those with `tensor` do; others keep a state."""
    without = facts.layers_without(tensor)
    return [layer not in without for layer in range(facts.layers)]


def kv_heads(facts: Facts) -> int:
    """Of keys, in the layers that attend."""
    return max(facts.by_layer("attention.head_count_kv"))


def has_any(facts: Facts, end: str) -> bool:
    """Whether any tensor's name ends so."""
    return any(name.endswith(end) for name in facts.tensors)


def head_of_values(facts: Facts) -> int:
    """Elements of a head that a state makes."""
    return facts.whole("ssm.inner_size") // (facts.whole("ssm.time_step_rank") or 1)
