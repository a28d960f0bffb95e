"""Arenas and lowering: rows do not collide, hazards are seen through columns and shared bytes,
programs are reused.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from test_program import words_of

import hmc
from hmc.codegen.arguments import ARGS
from hmc.codegen.pool import walker
from hmc.errors import ExecutionError
from hmc.plan import Buffer, Operand, Phase, Step
from hmc.runtime.host.arena import Arena
from hmc.runtime.host.program import Program


def operand(name, width, column=0):
    return Operand(buffer=name, column=column, width=width)


def phase():
    """wide, bytes [0, 160) of a token, shares with late [64, 96), slim [160, 176) with nobody."""
    buffers = (
        Buffer(name="ids", dtype="i32", width=1, offset=-1),
        Buffer(name="logits", dtype="f32", width=5, offset=-1),
        Buffer(name="wide", dtype="f32", width=40, offset=0),
        Buffer(name="late", dtype="bf16", width=16, offset=64),
        Buffer(name="slim", dtype="f32", width=4, offset=160),
    )
    steps = (
        Step(
            id=0,
            op="rotary",
            layer=0,
            resource="cpu",
            inputs={"x": operand("wide", 8, 16)},
            outputs={"x": operand("wide", 8, 16)},
        ),
    )
    return Phase(name="p", max_tokens=7, activation_bytes=176, buffers=buffers, steps=steps)


@pytest.fixture
def arena():
    arena = Arena(phase())
    yield arena
    arena.close()


def test_rows_are_one_width_apart_and_buffers_apart(arena):
    wide, slim = operand("wide", 40), operand("slim", 4)
    assert arena.stride(wide) == 40
    assert arena.address(operand("wide", 8, 16)) == arena.address(wide) + 64
    assert arena.packed(wide)
    assert not arena.packed(operand("wide", 8, 16))
    arena.array(wide, 7)[:] = 1
    arena.array(slim, 7)[:] = 2
    arena.array(operand("wide", 8, 16), 3)[:] = 3
    expected = np.ones((7, 40))
    expected[:3, 16:24] = 3
    assert np.array_equal(arena.array(wide, 7), expected)
    assert np.array_equal(arena.array(slim, 7), np.full((7, 4), 2.0))


def test_hazards_know_columns_and_shared_bytes(arena):
    middle, left = operand("wide", 8, 16), operand("wide", 16)
    assert not arena.touched(middle) & arena.touched(left)
    assert arena.touched(middle) < arena.touched(operand("wide", 40))
    late = operand("late", 16)
    assert arena.touched(middle) <= arena.overwritten(late)
    assert arena.touched(late) <= arena.overwritten(middle)
    assert not arena.overwritten(late) & arena.touched(operand("slim", 4))


def test_workspaces_are_shared_by_name_and_size(arena):
    assert arena.workspace("act", 100) == arena.workspace("act", 100)
    assert arena.workspace("act", 100) != arena.workspace("other", 100)
    assert arena.logits.shape == (7, 5)
    arena.inputs("ids")[:] = 4
    assert arena.inputs("ids").tolist() == [4] * 7


@pytest.mark.parametrize(
    "family",
    [
        "mixtral",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("qwen3_moe", "deepseek_v3")),
    ],
)
def test_a_phase_is_one_native_program(checkpoint, family):
    """One call for the layers and the wanted rows; a barrier between a write and its reader."""
    plan = hmc.compile(checkpoint(family, "fp8"), max_context=64)
    with hmc.Engine(plan) as engine:
        for phase in engine.executor.phases.values():
            program = phase.program
            assert isinstance(program, Program)
            assert 0 < (program.records[:, 2] & walker.BARRIER).sum() < len(program)
        decode = engine.executor.phases["decode"]
        program = decode.program
        ops = [kernel.spec.op for kernel in program.kernels]
        assert ops[-3:] == ["gather_rows", "norm", "linear"]
        assert (program.records[-3:, 2] == walker.BARRIER).all()
        for number in (0, 17):
            tokens = np.zeros(number, np.int32)
            with pytest.raises(ExecutionError, match=r"takes 1\.\.16 tokens"):
                decode.run(tokens, tokens, tokens, tokens)


@pytest.mark.slow
def test_prefill_without_wanted_rows_reads_no_output_weights(checkpoint):
    plan = hmc.compile(checkpoint("qwen3_moe", "bf16"), max_context=128, max_chunk=32)
    with hmc.Engine(plan) as engine:
        run, walked = engine.executor, []
        prefill = run.phases["prefill.host"]
        program = prefill.program
        pool = prefill._pool
        prefill._pool = SimpleNamespace(
            run=lambda records: (walked.append(_tokens(program, len(records))), pool.run(records))
        )
        sequence = run.open()
        ids = np.arange(3, 73, dtype=np.int32)
        shapes = [logits.shape for logits in run.prefill(sequence, ids)]
        run.release(sequence)
        assert shapes == [(0, 503), (0, 503), (1, 503)]
        # The last three records gather, norm and multiply the wanted rows.
        assert [len(set(counts)) for counts in walked] == [1, 1, 2]
        assert sum(max(counts) for counts in walked) == 70
        assert walked[2][-3:] == [1, 1, 1]


def _tokens(program, count):
    """The `tokens` words of the first `count` records that have one."""
    result = []
    for index in range(count):
        names = [arg.name for arg in ARGS[program.kernels[index].spec.op]]
        if "tokens" in names:
            result.append(words_of(program, index)[names.index("tokens")])
    return result
