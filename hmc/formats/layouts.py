"""How checkpoints lay planes out otherwise than kernels read them: shapes alone; what is done to
the bytes when weights are opened stands in `arrange.py`, by the same names.

Kernels read rows: of a weight [N, K] the codes of an output one after the other, N rows of scales.
Sizes are given by a plane's elements as kernels read them, [n, k], and the bits of a stored word.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layout:
    """`shape(n, k, bits)` is that of the stored tensor; `makes` the dtype that its numbers have in
    memory where that is not the stored one; `ordered`: columns lie in memory in the order that the
    weight's plane of order says.
    """

    name: str
    shape: Callable[[int, int, int], tuple[int, ...]] = field(repr=False)
    makes: str = ""
    ordered: bool = False


def _packed(code: int) -> Callable[[int, int, int], tuple[int, ...]]:
    """[k, n], words of codes of so many bits along n."""
    return lambda n, k, bits: (k, -(-n * code // bits))


def _by_input(code: int) -> Callable[[int, int, int], tuple[int, ...]]:
    """[k, n], words of codes of so many bits along k."""
    return lambda n, k, bits: (-(-k * code // bits), n)


def _by_output(code: int) -> Callable[[int, int, int], tuple[int, ...]]:
    """[n, k], words of codes of so many bits along n."""
    return lambda n, k, bits: (-(-n * code // bits), k)


AS_READ = Layout("", lambda n, k, bits: (n, k))
TRANSPOSED = Layout("transposed", lambda n, k, bits: (k, n))
"""Elements [k, n]."""
BY_INPUT = {bits: Layout(f"by_input{bits}", _by_input(bits)) for bits in (4, 8)}
"""GPTQ's codes: words along the inputs, [k / 8, n]."""
BY_GROUP = {bits: Layout(f"by_group{bits}", _by_input(bits), ordered=True) for bits in (4, 8)}
"""The same where each column is of a group of its own: in memory they lie group after group."""
GROUP_OF = Layout("group_of", AS_READ.shape)
"""The group of each column: in memory which column lies where."""
AWQ = Layout("awq", _packed(4))
"""AWQ's codes: words along the outputs, [k, n / 8], whose nibbles hold outputs 0 2 4 6 1 3 5 7."""
AWQ_ZEROS = Layout("awq_zeros", _packed(4), "BF16")
"""The same of zeros."""
GPTQ_ZEROS = {bits: Layout(f"gptq_zeros{bits}", _packed(bits), "BF16") for bits in (4, 8)}
"""GPTQ's zeros [groups, n / 8], outputs in order, each stored less 1 (checkpoint_format gptq)."""
GPTQ2_ZEROS = {bits: Layout(f"gptq2_zeros{bits}", _packed(bits), "BF16") for bits in (4, 8)}
"""The same, stored as they are (checkpoint_format gptq_v2)."""
PACKED_ZEROS = {bits: Layout(f"packed_zeros{bits}", _by_output(bits), "BF16") for bits in (4, 8)}
"""Zeros of compressed-tensors: words along the outputs, [n / 8, groups]."""
SIGNED_ZEROS = Layout("signed_zeros", lambda n, k, bits: (n, k), "BF16")
"""The same, not packed: -128 to 127."""
RECIPROCAL = Layout("reciprocal", lambda n, k, bits: (1,))
"""One number that codes are divided by: in memory what they are multiplied by."""
