"""Workers of several NUMA nodes: whose pieces they draw, and which rows of experts are a node's."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from kernel_calls import address, guarded
from test_experts import Layer

from hmc.codegen.arguments import ARGS, Arg
from hmc.codegen.decode.pieces import TICKET, Teams, flags, share
from hmc.codegen.ir import I64, Emitter, const
from hmc.codegen.isa import best_isa
from hmc.codegen.jit import KERNEL_TYPE, Jit
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.spec import KernelSpec

ISA = best_isa()
TEST_ARGS = {
    # log[0] counts calls, what follows are the share and the span of each.
    "test_log": (Arg("log", "ptr"),),
    # What a worker of a pool does with a record.
    "test_share": (Arg("kernel"), Arg("block"), Arg("word"), Arg("count"), Arg("bounds")),
}


def emit_log(spec: KernelSpec) -> str:
    e = Emitter(spec)
    b, log = e.b, e.arg["log"]
    before = e.load(log, const(0), I64)
    place = b.add(b.mul(before, const(2)), const(1))
    e.store(e.worker, log, place)
    e.store(e.span, log, b.add(place, const(1)))
    e.store(b.add(before, const(1)), log, const(0))
    return e.finish()


def emit_share(spec: KernelSpec) -> str:
    e = Emitter(spec)
    b = e.b
    kernel = b.inttoptr(e.arg["kernel"], KERNEL_TYPE.as_pointer())
    teams = Teams.read(e, e.arg["count"], b.inttoptr(e.arg["bounds"], I64.as_pointer()))
    share(e, kernel, e.arg["block"], e.arg["word"], teams)
    return e.finish()


@pytest.fixture(scope="module")
def jit() -> Iterator[Jit]:
    ARGS.update(TEST_ARGS)
    yield Jit({**EMITTERS, "test_log": emit_log, "test_share": emit_share})
    for name in TEST_ARGS:
        del ARGS[name]


def test_pieces_of_the_own_team_are_drawn_first(jit: Jit) -> None:
    """Five workers in two teams, six pieces each, of which four are kept; worker 3 comes first."""
    log, call = (jit.get(KernelSpec.of(name, ISA.name)) for name in TEST_ARGS)
    bounds, seen = np.array([0, 2, 5]), np.zeros(100, np.int64)
    memory = np.zeros(3 * TICKET, np.int64)  # a ticket for each team, and the arguments
    memory[2 * TICKET] = seen.ctypes.data
    block = memory.ctypes.data + 8 * 2 * TICKET
    word = flags(6, 4)
    args = np.array([log.address, block, word, 2, bounds.ctypes.data])

    def calls(worker: int) -> list[tuple[int, int]]:
        seen[0] = 0
        call(args.tobytes(), worker, 5)
        return [(int(first), int(span)) for first, span in seen[1 : 1 + 2 * seen[0]].reshape(-1, 2)]

    for _ in range(2):  # tickets start anew
        own, others = (16, 22, 28, 17, 23, 29), (4, 10, 5, 11)
        assert calls(3) == [(18, 4), *((first, 1) for first in (*own, *others))]
        for worker in (0, 4, 2, 1):
            assert memory[:TICKET].any() and memory[TICKET : 2 * TICKET].any()
            assert calls(worker) == [(6 * worker, 4)]
        assert not memory[: 2 * TICKET].any()


@pytest.mark.parametrize("bounds", [(0, 2, 5), (0, 1, 2, 3, 4, 5), (0, 5)])
def test_first_halves_of_experts_keep_to_the_rows_of_a_node(
    jit: Jit, bounds: tuple[int, ...]
) -> None:
    """The same results, and no worker computes a row of another team's."""
    layer = Layer(ISA.name, "bf16", 64, 112, 0)
    x = guarded(np.random.default_rng(1).integers(0x3C00, 0x3F80, (3, 64)).astype(np.uint16))
    ids, workers = layer.choose(3), bounds[-1]
    table = np.array([len(bounds) - 1, *bounds])
    whole = layer.gate_up(jit, x, ids, 1)
    np.testing.assert_array_equal(layer.gate_up(jit, x, ids, workers, teams=table), whole)
    groups = 112 // 16
    kernel, untouched = jit.get(layer.first), 0x7FC1
    for team, (begin, end) in enumerate(pairwise(bounds)):
        act = np.full_like(whole, untouched)
        args = {
            "x": address(x), "x_stride": 64, "ids": address(ids), "table": address(layer.table),
            "act": address(act), "tokens": 3, "scratch": 0, "routing": 0, "gate_bias": 0,
            "up_bias": 0, "teams": address(table),
        }  # fmt: skip
        block = np.array([args[arg.name] for arg in ARGS["experts_gate_up"]], np.int64).tobytes()
        for piece in range(4 * begin, 4 * end):  # in pieces too
            kernel(block, piece, 4 * workers)
        first, last = (16 * (groups * edge // workers) for edge in (begin, end))
        np.testing.assert_array_equal(act[:, first:last], whole[:, first:last], str(team))
        assert (act[:, :first] == untouched).all() and (act[:, last:] == untouched).all()
