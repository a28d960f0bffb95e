"""An op with a state a sequence, and layers that keep unlike states, run as every other model does:
in chunks, in batches, on devices, with prompts that begin alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from models.reference import load_model, run
from played import executor
from running import NAME, Layer, Running, reference, registered
from running_model import built, ids_of, request, write
from split_plans import DUAL, STREAM, split_plan

import hmc
from hmc.checkpoint.config import ModelConfig
from hmc.cli.show_command import command as show
from hmc.codegen.arguments import pack
from hmc.codegen.isa import TIERS, cpu_flags
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.codegen.spec import KernelSpec
from hmc.errors import PassFailedError, VerifyError
from hmc.models import FAMILIES, Family
from hmc.models.common import CausalLM
from hmc.plan import Plan, save_plan, verify_plan
from hmc.plan.phases import chunk_tokens
from hmc.runtime.batching.scheduler import Scheduler
from hmc.runtime.executor import Executor
from hmc.runtime.tokens.kept import Kept

BLOCK, CHUNK = 64, 96
CLOSE = 0.03
"""Relative error of logits: weights and activations between matmuls are bf16."""


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    with registered():
        yield


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, known: None) -> Path:
    """A random checkpoint of the family in bf16."""
    found = tmp_path_factory.mktemp(NAME)
    write(found)
    return found


@pytest.fixture(scope="module")
def plan(directory: Path) -> Plan:
    return built(hmc.compile(directory, max_context=320, max_chunk=CHUNK, threads=2))


@pytest.fixture(scope="module")
def engine(plan: Plan) -> Iterator[hmc.Engine]:
    with hmc.Engine(plan) as found:
        yield found


@pytest.fixture(scope="module")
def expected(directory: Path) -> Callable[[list[int]], np.ndarray]:
    """Logits of a prompt by the torch blocks, in float32."""
    module = load_model(directory).module
    return lambda ids: run(module, ids).numpy()


def error(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# -- the kernel ------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", [name for name, tier in TIERS.items() if tier.flags <= cpu_flags()])
@pytest.mark.parametrize("width", [7, 33])
def test_kernel_equals_the_reference(isa: str, width: int) -> None:
    jit = Jit(EMITTERS)
    kernel = jit.get(KernelSpec.of(NAME, isa, width=width))
    rng = np.random.default_rng(2)
    x = rng.standard_normal((5, width), np.float32)
    for slots in ([2, 2, 2, 2, 2], [3, 0, 4, 1, 2]):
        state = rng.standard_normal((6, width), np.float32)
        alone = len(set(slots)) == 1
        given = torch.from_numpy(x)[None] if alone else torch.from_numpy(x)[:, None]
        before = torch.from_numpy(state[slots[:1] if alone else slots])
        made, after = reference({"decay": 0.5}, {"x": given}, {}, {"running": before})
        whole, y = state.copy(), np.zeros_like(x)
        rows = np.array(slots, np.int32)
        at = {"x": x, "y": y, "state": whole, "sequence": rows}
        block = pack(
            NAME,
            **{name: array.ctypes.data for name, array in at.items()},
            **{f"{name}_stride": width for name in ("x", "y", "state")},
            tokens=5,
            decay=0.5,
        )
        for worker in range(3):
            kernel(block, worker, 3)
        np.testing.assert_allclose(y, made["y"].reshape(5, width), rtol=1e-6, atol=1e-6)
        kept = state.copy()
        kept[slots[:1] if alone else slots] = after["running"]
        np.testing.assert_allclose(whole, kept, rtol=1e-6, atol=1e-6)


# -- the plan --------------------------------------------------------------------------------------


def test_layers_keep_unlike_states_by_name(plan: Plan) -> None:
    kv = plan.kv
    assert [[(s.name, s.width, s.per) for s in group.states] for group in kv.groups] == [
        [("k", 32, "token"), ("v", 32, "token"), ("running", 64, "sequence")],
        [("running", 64, "sequence")],
        [("k", 16, "token"), ("v", 16, "token")],
    ]
    assert (kv.bytes_per_token, kv.bytes_per_sequence) == (2 * 96, 2 * 4 * 64)
    assert (kv.sequences, kv.snapshots) == (plan.limits.max_batch, kv.blocks)
    items = {item.kind: item for item in plan.ledger}
    assert items["sequence states"].bytes == kv.slots * kv.bytes_per_sequence
    assert items["KV cache"].bytes == kv.capacity_tokens * kv.bytes_per_token


def test_another_layout_is_refused(plan: Plan) -> None:
    first, *rest = plan.kv.groups
    state = first.states[-1]
    for change in ({"width": 63}, {"per": "token"}, {"dtype": "bf16"}, {"window": 4}):
        states = (*first.states[:-1], replace(state, **change))
        groups = (first.model_copy(update={"states": states}), *rest)
        kv = plan.kv.model_copy(update={"groups": groups})
        with pytest.raises(VerifyError, match="keep other states than the cache's layout says"):
            verify_plan(plan.model_copy(update={"kv": kv}))


def test_two_nodes_of_a_layer_share_no_state(directory: Path) -> None:
    class Twice(Layer):
        def __init__(self, config: ModelConfig, index: int) -> None:
            super().__init__(config, index)
            self.running = torch.nn.Sequential(self.running, Running(64, 0.5))

    twice = Family("twice", lambda config: CausalLM(config, partial(Twice, config)))
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FAMILIES, NAME, twice)
        with pytest.raises(PassFailedError, match="two nodes of layer 0 keep a state running"):
            hmc.compile(directory)


def test_show_tells_what_is_kept(plan: Plan, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    save_plan(plan, tmp_path / "a.hmp")
    show.main([str(tmp_path / "a.hmp")], standalone_mode=False)
    said = capsys.readouterr().out
    assert "running" in said and "a sequence" in said and "snapshots of 512 B" in said


def test_chunks_end_where_states_can_be_kept(plan: Plan) -> None:
    kept, host = plan.kv.stops(0, 200, 128), "prefill.host"
    assert [stop.tokens for stop in kept] == [128, 192]
    assert [chunk_tokens(plan, host, 200 - past, 0, past, kept) for past in (0, 64)] == [64, 64]
    assert [chunk_tokens(plan, host, 72, busy, 128, kept) for busy in (0, 3)] == [64, 64]
    assert chunk_tokens(plan, host, 8, 0, 192, kept) == 8
    # others end with pages, too: a prompt is the same blocks of tokens however it is cut
    assert chunk_tokens(plan, host, 150, 0, 50, kept[1:]) == 78
    assert [chunk_tokens(plan, host, left, 0, 200 - left) for left in (200, 136, 72)] == [
        64,
        64,
        72,
    ]
    assert chunk_tokens(plan, host, 97, 0, 60) == 68
    # a call that streams all weights ends for the last of them alone
    wide = split_plan(Path(plan.checkpoint.path), gpus=1)
    assert chunk_tokens(wide, STREAM, 200, 0, 0, kept) == 192
    none = plan.model_copy(update={"kv": plan.kv.model_copy(update={"snapshots": 0})})
    assert none.kv.stops(0, 200) == ()


# -- on the CPU ------------------------------------------------------------------------------------


def test_chunks_and_decode_equal_the_reference(engine: hmc.Engine, expected: Callable) -> None:
    ids = ids_of(230)
    found = expected(ids)
    assert error(engine.logits(ids), found) < CLOSE
    assert error(engine.decode_logits(ids[:40]), found[:40]) < CLOSE
    # a row that was used before begins with zeros again
    assert error(engine.logits(ids), found) < CLOSE


def test_a_batch_keeps_sequences_apart(engine: hmc.Engine, expected: Callable) -> None:
    _batch_equals_the_reference(engine.executor, expected)


def _batch_equals_the_reference(found: Executor, expected: Callable) -> None:
    texts = [ids_of(length, seed) for seed, length in enumerate((3, 70, 20))]
    open_ = [found.open() for _ in texts]
    for sequence, ids in zip(open_, texts, strict=True):
        for _ in found.prefill(sequence, np.array(ids[:-2], np.int32)):
            pass
    for at in (-2, -1):
        tokens = np.array([ids[at] for ids in texts], np.int32)
        logits = found.decode(open_, tokens)
        for ids, row in zip(texts, logits, strict=True):
            assert error(row, expected(ids)[at]) < CLOSE
    for sequence in open_:
        found.release(sequence)


def test_requests_that_make_room_answer_as_if_alone(engine: hmc.Engine) -> None:
    mixed = [(ids_of(9 + 31 * seed, seed), 70 + seed) for seed in range(6)]
    alone = [engine.generate(ids, max_new_tokens=n, temperature=0).token_ids for ids, n in mixed]
    kv = engine.executor.kv
    held = kv.allocator.take(kv.allocator.count - 6)
    with Scheduler(engine.executor) as scheduler:
        tickets = [scheduler.submit(request(ids, new)) for ids, new in mixed]
        for ticket, answer in zip(tickets, alone, strict=True):
            assert ticket.wait(60) and ticket.result().token_ids == answer
        assert scheduler.stats().preemptions > 0
    kv.allocator.give_back(held)
    assert kv.allocator.used == 0


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_requests_answer_as_if_alone(
    engine: hmc.Engine, prefix_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, mixed = ids_of(150, 20), []
    for seed in range(12):
        mixed.append((head[: 50 * (seed % 4)] + ids_of(3 + 11 * seed, seed), 1 + seed))
    alone = [engine.generate(ids, max_new_tokens=n, temperature=0).token_ids for ids, n in mixed]
    if not prefix_cache:
        monkeypatch.setattr(engine.executor.kv, "adopt", lambda *_: 0)
    with Scheduler(engine.executor) as scheduler:
        cancelled = [scheduler.submit(request(ids_of(200, seed), 50)) for seed in range(3)]
        tickets = [scheduler.submit(request(ids, new)) for ids, new in mixed]
        for ticket in cancelled:
            ticket.cancel()
        for ticket, answer in zip(tickets, alone, strict=True):
            assert ticket.wait(60) and ticket.result().token_ids == answer
        stats = scheduler.stats()
    assert (stats.prefix_tokens > 0) == prefix_cache
    assert stats.snapshots > 0
    assert stats.snapshots_total == engine.plan.kv.snapshots
    assert engine.executor.kv.allocator.used == 0


def test_a_prompt_goes_on_from_a_snapshot(engine: hmc.Engine, expected: Callable) -> None:
    _reused(engine.executor, expected)


def _reused(found: Executor, expected: Callable) -> None:
    """A prompt that begins as another did, whose states at the end of its blocks were kept."""
    head = ids_of(2 * BLOCK, 7)
    kv = found.kv
    tails = ids_of(30, 8), ids_of(20, 9), ids_of(100, 10), ids_of(100, 10)
    for tail, cached in zip(tails, (0, 2, 2, 3), strict=True):
        ids, sequence = np.array(head + tail, np.int32), found.open()
        assert kv.adopt(sequence, ids) == cached * BLOCK
        kv.reserve(sequence, len(ids) - sequence.length)
        last = np.zeros(0)
        for each in found.prefill(sequence, ids[sequence.length :], phase="prefill.host"):
            kv.keep(sequence, ids)
            last = each
        assert error(last[-1], expected(ids.tolist())[-1]) < CLOSE
        found.release(sequence)


def test_a_conversation_goes_back_to_the_last_prompt(
    engine: hmc.Engine, expected: Callable
) -> None:
    """Answers are stored as decode steps wrote them; what follows them is the conversation's."""
    with Kept(engine.executor) as kept:

        def turn(ids: list[int], new: int) -> tuple[list[int], int]:
            stream = engine.stream(ids, kept=kept, max_new_tokens=new, temperature=0)
            said = [piece.token_ids[0] for piece in stream]
            # what is stored is right: its last token's logits are those of all of it
            text = [*ids, *said]
            with kept.holding(np.array([*text, 7], np.int32), []) as sequence:
                assert sequence.length == len(text) - 1
                *_, last = engine.executor.prefill(sequence, np.array(text[-1:], np.int32))
                assert error(last[-1], expected(text)[-1]) < CLOSE
            return said, stream.cached_tokens

        first = ids_of(90, 41)
        said, known = turn(first, 30)
        assert known == 0
        second = [*first, *said, *ids_of(40, 42)]
        said, known = turn(second, 20)
        assert known == len(first) + 30
        third = [*second, *said, *ids_of(60, 43)]
        answer, known = turn(third, 9)
        assert known == len(second) + len(said)
        again, known = turn(third, 9)  # regenerated
        assert again == answer and known == (len(third) - 1) // BLOCK * BLOCK
        edited = [*second, *said, *ids_of(50, 44)]
        _, known = turn(edited, 3)
        assert known == (len(second) - 1) // BLOCK * BLOCK
        _, known = turn([*first[:-5], *ids_of(50, 45)], 3)
        assert known == BLOCK
        _, known = turn(ids_of(70, 46), 3)
        assert known == 0
    assert engine.executor.kv.allocator.used == 0


def test_without_room_for_snapshots_no_prompt_is_reused(
    engine: hmc.Engine, plan: Plan, expected: Callable
) -> None:
    kv = plan.kv.model_copy(update={"snapshots": 0})
    with executor(plan.model_copy(update={"kv": kv}), Path(plan.checkpoint.path)) as found:
        ids = np.array(ids_of(2 * BLOCK + 5), np.int32)
        for _ in range(2):
            sequence = found.open()
            assert found.kv.adopt(sequence, ids) == 0
            *_, last = found.prefill(sequence, ids)
            assert error(last[-1], expected(ids.tolist())[-1]) < CLOSE
            found.kv.keep(sequence, ids)
            assert len(found.kv.snapshots) == 0
            found.release(sequence)


# -- on devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [1, 2])
def test_gpu_phases_run_it_by_its_reference(directory: Path, gpus: int, expected: Callable) -> None:
    plan = built(split_plan(directory, gpus=gpus, switches=True))
    assert all(phase.ranks == 1 for phase in plan.phases)
    assert {STREAM, DUAL} <= {phase.name for phase in plan.phases}
    assert "prefill.beside" not in {phase.name for phase in plan.phases}
    with executor(plan, directory) as found:
        for phase in ("prefill.host", STREAM):
            ids, sequence = ids_of(90, 3), found.open()
            *_, last = found.prefill(sequence, np.array(ids[:-1], np.int32), phase=phase)
            assert error(last[-1], expected(ids)[-2]) < CLOSE
            row = found.decode([sequence], np.array(ids[-1:], np.int32))
            assert error(row[0], expected(ids)[-1]) < CLOSE
            found.release(sequence)
        _batch_equals_the_reference(found, expected)
        _reused(found, expected)
        assert found.calls[DUAL] > 0
        # a prompt streams once, up to where its states are kept
        head = ids_of(2 * BLOCK, 51)
        for tail, streams in ((ids_of(9, 52), 1), (ids_of(5, 53), 0)):
            ids, before = np.array(head + tail, np.int32), found.calls[STREAM]
            with Scheduler(found) as scheduler:
                ticket = scheduler.submit(request(ids.tolist(), 1))
                assert ticket.wait(60)
            assert ticket.result().token_ids == (int(np.argmax(expected(ids.tolist())[-1])),)
            assert found.calls[STREAM] - before == streams
