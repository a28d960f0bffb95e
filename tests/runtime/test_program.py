import ctypes
import struct
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmc.codegen.arguments import ARGS, pack
from hmc.codegen.decode.pieces import TICKET
from hmc.codegen.decode.pieces import flags as flags_of
from hmc.codegen.jit import Kernel
from hmc.codegen.pool import walker
from hmc.codegen.spec import KernelSpec
from hmc.runtime.host.program import Program, ProgramBuilder

FILL = Kernel(KernelSpec.of("stream_fill", "avx2"), 0x1000)
ADD = Kernel(KernelSpec.of("norm", "avx2", width=8), 0x2000)


def fill_args(base: int = 0, size: int = 0, value: int = 0) -> bytes:
    return pack("stream_fill", base=base, size=size, value=value)


def norm_args(tokens: int, eps: float) -> bytes:
    words = dict.fromkeys((arg.name for arg in ARGS["norm"]), 0)
    return pack("norm", **{**words, "tokens": tokens, "eps": eps})


def words_of(program: Program, index: int) -> list[int]:
    """The argument words of a record."""
    count = len(ARGS[program.kernels[index].spec.op])
    return list((ctypes.c_int64 * count).from_address(int(program.records[index, 1])))


def block_of(program: Program, index: int) -> bytes:
    return np.array(words_of(program, index), np.int64).tobytes()


def flags(accesses: Sequence[tuple[str, str]]) -> list[int]:
    builder = ProgramBuilder()
    for index, (reads, writes) in enumerate(accesses):
        builder.add(FILL, fill_args(), tag=index, reads=reads, writes=writes)
    return [int(flag) for flag in builder.build().records[:, 2]]


def test_barriers_only_where_data_flows() -> None:
    assert flags([("", "a"), ("", "b"), ("w", "c")]) == [0, 0, 0]
    assert flags([("", "a"), ("a", "b")]) == [0, 1]  # read after write
    assert flags([("a", "b"), ("", "a")]) == [0, 1]  # write after read
    assert flags([("", "a"), ("", "a")]) == [0, 1]  # write after write
    assert flags([("a", "b"), ("a", "c")]) == [0, 0]  # two readers
    assert flags([("x", "x"), ("y", "y")]) == [0, 0]  # in place
    assert flags([("", "a"), ("a", "b"), ("a", "c"), ("b", "d")]) == [0, 1, 0, 1]


def test_a_barrier_orders_everything_before_it() -> None:
    # The barrier for b also finished a: reading a needs no second one.
    assert flags([("", "a"), ("", "b"), ("b", "c"), ("a", "d")]) == [0, 0, 1, 0]


@given(st.lists(st.tuples(st.text("abcd", max_size=2), st.text("abcd", max_size=2)), max_size=12))
def test_conflicting_records_are_separated_and_no_barrier_is_idle(
    accesses: list[tuple[str, str]],
) -> None:
    found = flags(accesses)

    def conflict(first: int, second: int) -> bool:
        (r1, w1), (r2, w2) = accesses[first], accesses[second]
        return bool(set(w1) & (set(r2) | set(w2)) or set(r1) & set(w2))

    last = 0
    for index, flag in enumerate(found):
        if flag:
            assert any(conflict(earlier, index) for earlier in range(last, index))
            last = index
        assert not any(conflict(earlier, index) for earlier in range(last, index))


def test_records_point_at_aligned_copies_of_the_arguments() -> None:
    builder = ProgramBuilder()
    builder.add(FILL, fill_args(8, 16, -3), tag=7)
    builder.add(ADD, norm_args(5, 1e-6), tag=9)
    builder.add(FILL, fill_args(1, 2, 3), tag=7)
    program = builder.build()
    assert len(program) == 3
    assert program.records.dtype == np.int64
    assert program.records.flags.c_contiguous
    assert list(program.records[:, 0]) == [0x1000, 0x2000, 0x1000]
    assert list(program.records[:, 3]) == [7, 9, 7]
    assert not (program.records[:, 1] % 64).any()
    assert words_of(program, 0) == [8, 16, -3]
    assert block_of(program, 1) == norm_args(5, 1e-6)
    assert (program.records[:, 2] & walker.BARRIER).sum() == 0
    assert program.kernels == (FILL, ADD, FILL)


def test_patch_changes_words_in_place() -> None:
    builder = ProgramBuilder()
    builder.add(ADD, norm_args(5, 1e-6), tag=0)
    builder.add(FILL, fill_args(8, 16, -3), tag=1)
    builder.add(ADD, norm_args(5, 1e-6), tag=2)
    program = builder.build()
    before = program.records.copy()
    program.patch_all(0, 1, tokens=3, eps=0.5)
    program.patch_all(size=32)
    assert block_of(program, 0) == norm_args(3, 0.5)
    assert block_of(program, 2) == norm_args(5, 1e-6)
    assert words_of(program, 1) == [8, 32, -3]
    program.patch_all(tokens=2)
    program.patch_all(eps=-2.0)
    assert block_of(program, 0) == norm_args(2, -2.0)
    assert block_of(program, 2) == norm_args(2, -2.0)
    assert struct.unpack("<f", block_of(program, 2)[-8:-4]) == (-2.0,)
    program.patch_all(0, 1, tokens=7)
    program.patch_all(1, 3, tokens=8)
    assert block_of(program, 0) == norm_args(7, -2.0)
    assert block_of(program, 2) == norm_args(8, -2.0)
    with pytest.raises(ValueError, match="tokens is no argument in records 1 to 2"):
        program.patch_all(1, 2, tokens=8)
    assert (program.records == before).all()
    assert (program.records[:, 2] & walker.BARRIER == 0).all()


def test_pieces_are_flags_and_have_a_ticket() -> None:
    builder = ProgramBuilder()
    builder.add(FILL, fill_args(), tag=0, writes="a", pieces=(32, 24))
    builder.add(FILL, fill_args(), tag=0, reads="a", pieces=(32, 24))
    builder.add(FILL, fill_args(), tag=0)
    program = builder.build()
    first, second, third = (int(word) for word in program.records[:, 2])
    assert first == flags_of(32, 24) != 0
    assert second == first | walker.BARRIER
    assert third == 0
    assert (program.records[:, 2] & walker.BARRIER).sum() == 1
    # Where a ticket lies there is nothing else: each record's line before its block is zero.
    for address in program.records[:, 1].tolist():
        line = ctypes.string_at(address - 8 * TICKET, 8 * TICKET)
        assert line == bytes(8 * TICKET)


@pytest.mark.parametrize("pieces", [(3, 4), (-1, 0), (1 << 16, 0), (4, -1)])
def test_odd_pieces_are_refused(pieces: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a share of"):
        ProgramBuilder().add(FILL, fill_args(), tag=0, pieces=pieces)


def test_wrong_arguments_are_refused() -> None:
    builder = ProgramBuilder()
    with pytest.raises(ValueError, match="record 0: kernel stream_fill takes 3 argument words"):
        builder.add(FILL, fill_args() + b"12345678", tag=0)
    builder.add(FILL, fill_args(), tag=0)
    program = builder.build()
    with pytest.raises(ValueError, match="tokens is no argument"):
        program.patch_all(tokens=1)


def test_an_empty_program_has_no_records() -> None:
    program = ProgramBuilder().build()
    assert program.records.shape == (0, 4)
