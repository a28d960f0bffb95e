"""Layers that see a window in rings of pages: the same bits as with all pages kept, however prompts
are cut, for batches of sequences much longer than a ring, and for prompts that begin alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import attending
import numpy as np
import pytest
import quirky
from footprint import footprint
from mutations import Mutator
from numpy.typing import NDArray
from played import executor
from split_plans import split_plan

import hmc
from hmc.errors import VerifyError
from hmc.models import FAMILIES
from hmc.plan import Plan
from hmc.plan.verify import verify_plan
from hmc.runtime.batching.scheduler import Scheduler
from hmc.runtime.memory.kv import cache_bytes
from hmc.runtime.tokens.generation import Ends, opened
from hmc.runtime.tokens.kept import Kept
from hmc.runtime.tokens.requests import Request
from hmc.runtime.tokens.sampler import Sampler, SamplingParams
from hmc.runtime.tokens.text import StopStrings

LENGTHS = (370, 5, 130)
ONE_BY_ONE = (140, 5)
MORE = 70
BLOCK = 64


@pytest.fixture(scope="module")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]
) -> Iterator[Callable[[str], Path]]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FAMILIES, "attending", attending.FAMILY)
        own = tmp_path_factory.mktemp("windows")
        quirky.write(own, "attending", len(attending.kinds()))
        yield lambda family: own if family == "attending" else tiny(family)


def compiled(directory: Path, chunk: int = 16) -> Plan:
    """A plan with rings, which pay for so many sequences."""
    plan: Plan = hmc.compile(directory, max_chunk=chunk, concurrency=12)
    assert plan.kv.room == chunk and plan.kv.snapshots
    return plan


def whole(plan: Plan) -> Plan:
    """The same with all pages of every layer."""
    kv = plan.kv.model_copy(update={"room": 0, "snapshots": 0})
    return plan.model_copy(update={"kv": kv})


def ids_of(length: int, seed: int) -> NDArray[np.int32]:
    return np.random.default_rng(seed).integers(3, 300, length).astype(np.int32)


def answers(
    plan: Plan, directory: Path, chunk: int, lengths: tuple[int, ...] = LENGTHS
) -> list[NDArray[np.float32]]:
    """Logits of every prompt token, by chunks, and of tokens that a batch goes on with."""
    texts, found = [ids_of(length + MORE, length) for length in lengths], []
    with executor(plan, directory, threads=1) as runs:
        open_ = [runs.open() for _ in texts]
        for sequence, ids, length in zip(open_, texts, lengths, strict=True):
            for at in range(0, length, chunk):
                part = ids[at : min(at + chunk, length)]
                rows = np.arange(len(part), dtype=np.int32)
                found.append(runs.append(sequence, part, rows).copy())
        for step in range(MORE):
            tokens = [ids[at + step] for ids, at in zip(texts, lengths, strict=True)]
            found.append(runs.decode(open_, np.array(tokens, np.int32)).copy())
        for sequence in open_:
            runs.release(sequence)
        assert runs.kv.allocator.used == 0
    return found


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("family", "chunk"),
    [
        ("attending", 1),
        *((family, c) for family in ("attending", "mimo_v2_flash") for c in (7, 64)),
        *(pytest.param("laguna", c, marks=pytest.mark.slow) for c in (7, 64)),
    ],
)
def test_the_same_bits(family: str, chunk: int, checkpoint: Callable[[str], Path]) -> None:
    directory, lengths = checkpoint(family), ONE_BY_ONE if chunk == 1 else LENGTHS
    plan = compiled(directory, chunk)
    rings = {plan.kv.ring(group) for group in plan.kv.groups} - {0}
    assert rings and max(rings) * BLOCK < max(lengths)
    expected = answers(whole(plan), directory, chunk, lengths)
    for found, right in zip(answers(plan, directory, chunk, lengths), expected, strict=True):
        np.testing.assert_array_equal(found, right)


@pytest.mark.slow
def test_rings_that_are_too_short_show(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("attending")
    plan = compiled(directory, 64)
    expected = answers(whole(plan), directory, 64)
    ring = type(plan.kv).ring
    monkeypatch.setattr(type(plan.kv), "ring", lambda *a: max(0, ring(*a) - 2))
    found = answers(plan, directory, 64)
    assert any((a != b).any() for a, b in zip(found, expected, strict=True))


def test_prompts_that_begin_alike(checkpoint: Callable[[str], Path]) -> None:
    """A prompt goes on from the windows at the end of a page as one that was computed whole."""
    directory = checkpoint("attending")
    plan, head = compiled(directory, BLOCK), ids_of(3 * BLOCK, 7)
    asked = [np.concatenate((head, ids_of(length, length))) for length in (150, 30, 90)]

    def last(kept: Plan, *, share: bool) -> list[NDArray[np.float32]]:
        found = []
        with executor(kept, directory) as runs:
            for number, ids in enumerate(asked):
                sequence = runs.open()
                if share:
                    # the second leaves what is known of the first where nothing was kept
                    assert runs.kv.adopt(sequence, ids) == (3 * BLOCK if number > 1 else 0)
                while sequence.length < len(ids):
                    part = ids[sequence.length :][:BLOCK]
                    logits = runs.append(sequence, part, np.array([len(part) - 1], np.int32))
                    runs.kv.keep(sequence, ids)
                found.append(logits.copy())
                found += [
                    runs.decode([sequence], np.array([token], np.int32)).copy()
                    for token in range(5, 15)
                ]
                runs.release(sequence)
        return found

    expected = last(whole(plan), share=False)
    for found, right in zip(last(plan, share=True), expected, strict=True):
        np.testing.assert_array_equal(found, right)


def request(ids: NDArray[np.int32], new: int) -> Request:
    ends = Ends(new, (1,), StopStrings(None))
    return Request(ids, Sampler(SamplingParams(), ids.tolist()), ends)


def test_requests_that_make_room_answer_as_if_alone(checkpoint: Callable[[str], Path]) -> None:
    directory = checkpoint("mimo_v2_flash")
    mixed = [(ids_of(9 + 31 * seed, seed), 70 + seed) for seed in range(6)]
    with executor(compiled(directory), directory) as runs, Scheduler(runs) as scheduler:
        alone = []
        for ids, new in mixed:
            ticket = scheduler.submit(request(ids, new))
            assert ticket.wait(60)
            alone.append(ticket.result().token_ids)
        allocator = runs.kv.allocator
        held = allocator.take(allocator.count - 6)
        tickets = [scheduler.submit(request(ids, new)) for ids, new in mixed]
        for ticket, answer in zip(tickets, alone, strict=True):
            assert ticket.wait(60) and ticket.result().token_ids == answer
        assert scheduler.stats().preemptions > 0
        allocator.give_back(held)
        assert allocator.used == 0


@pytest.mark.slow
def test_a_conversation_goes_on_or_begins_at_a_snapshot(
    checkpoint: Callable[[str], Path],
) -> None:
    """A ring holds no past: where a prompt leaves what is stored, it is not cut there."""
    directory = checkpoint("gpt_oss")
    plan, ids = compiled(directory), ids_of(300, 8)
    with executor(plan, directory, threads=1) as runs, Kept(runs) as kept:

        def computed(prompt: NDArray[np.int32], said: list[int]) -> int:
            with kept.holding(prompt, said) as sequence:
                there = sequence.length
                logits = None
                for each in runs.prefill(sequence, prompt[there:]):
                    kept.grown(sequence, prompt)
                    logits = each.copy()
                for token in said:
                    runs.decode([sequence], np.array([token], np.int32))
            with opened(runs) as alone:
                *_, whole = runs.prefill(alone, prompt)
                assert np.linalg.norm(logits - whole) < 0.03 * np.linalg.norm(whole)
            return len(prompt) - there

        assert computed(ids[:200], [5, 6, 7]) == 200
        assert computed(np.append(ids[:200], [5, 6, 7, 9]).astype(np.int32), []) == 1
        assert computed(np.append(ids[:200], [5, 8, 9]).astype(np.int32), [4]) == 203 - 3 * BLOCK
        assert computed(ids[50:], []) == 250
    assert runs.kv.allocator.used == 0


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_requests_answer_as_if_alone(
    prefix_cache: bool, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, head = checkpoint("mimo_v2_flash"), ids_of(200, 20)
    mixed = [
        (np.concatenate((head[: 70 * (seed % 4)], ids_of(3 + 11 * seed, seed))), 1 + seed)
        for seed in range(12)
    ]
    with executor(compiled(directory), directory) as runs:
        if not prefix_cache:
            monkeypatch.setattr(runs.kv, "adopt", lambda *_: 0)
        with Scheduler(runs) as scheduler:
            alone = []
            for ids, new in mixed:
                ticket = scheduler.submit(request(ids[::-1].copy(), new))
                assert ticket.wait(60)
                ticket = scheduler.submit(request(ids, new))
                assert ticket.wait(60)
                alone.append(ticket.result().token_ids)
            cancelled = [scheduler.submit(request(ids_of(200, seed), 50)) for seed in range(3)]
            tickets = [scheduler.submit(request(ids, new)) for ids, new in mixed]
            for ticket in cancelled:
                ticket.cancel()
            for ticket, answer in zip(tickets, alone, strict=True):
                assert ticket.wait(60) and ticket.result().token_ids == answer
            stats = scheduler.stats()
        assert (stats.prefix_tokens > 0) == prefix_cache
        assert runs.kv.allocator.used == 0 and runs.kv.rows_free == runs.plan.limits.max_batch


def test_the_ledger_is_what_is_allocated(checkpoint: Callable[[str], Path]) -> None:
    plan = compiled(checkpoint("laguna"))
    items = {item.kind: item.bytes for item in plan.ledger}
    held = items["KV cache"] + items["sequence states"]
    assert held == sum(plan.kv.rows(layer, state) * state.bytes for layer, state in plan.kv.each())
    assert held <= cache_bytes(plan.kv) < held + 64 * sum(1 for _ in plan.kv.each())
    assert cache_bytes(plan.kv) < 0.7 * cache_bytes(whole(plan).kv)
    (said,) = (each for each in plan.decisions if each.subject == "cache of windows")
    assert said.choice == "rings"


def test_short_contexts_keep_whole_pages(checkpoint: Callable[[str], Path]) -> None:
    plan: Plan = hmc.compile(checkpoint("laguna"), max_context=128, max_chunk=16)
    assert plan.kv.room == 0 and plan.kv.snapshots == 0


def test_broken_rings_are_refused(checkpoint: Callable[[str], Path]) -> None:
    plan = compiled(checkpoint("attending"))
    verify_plan(plan)
    for room in (15, 17):
        kv = plan.kv.model_copy(update={"room": room})
        with pytest.raises(VerifyError, match="rings for calls of"):
            verify_plan(plan.model_copy(update={"kv": kv}))
    split = split_plan(checkpoint("attending"))
    kv = split.kv.model_copy(update={"room": split.limits.max_chunk})
    with pytest.raises(VerifyError, match="where GPUs compute"):
        verify_plan(split.model_copy(update={"kv": kv}))


def test_a_field_changed_is_refused_or_changes_nothing(
    checkpoint: Callable[[str], Path],
) -> None:
    plan = compiled(checkpoint("mimo_v2_flash"))
    mutator, before = Mutator(plan), footprint(plan)
    for seed in range(150):
        found = mutator.mutation(seed)
        try:
            verify_plan(found.plan)
        except VerifyError:
            continue
        assert footprint(found.plan) == before, found.path
