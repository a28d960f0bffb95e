"""Mixed requests with cancellations on a model with states a sequence: whatever is reused, is
cancelled or makes room, each answers as it does alone, and no slot is lost.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from paged_fake import WAIT, crowded, prompts
from running import CONFIG, registered
from running_model import built, ids_of, request, write

import hmc
from hmc.errors import QueueFullError
from hmc.runtime.batching.scheduler import Scheduler
from hmc.runtime.tokens.requests import Ticket

SNAPSHOTS = 5


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[hmc.Engine]:
    """With fewer snapshots than there are prompts."""
    directory = tmp_path_factory.mktemp("running_storm")
    with registered():
        write(directory)
        sizes = {"max_context": 320, "max_chunk": 96, "cache_tokens": 64 * 20, "threads": 2}
        plan = hmc.compile(directory, **sizes, snapshot_memory=SNAPSHOTS * 512 / 1e9)
        assert plan.kv.snapshots == SNAPSHOTS and plan.kv.bytes_per_snapshot == 512
        with hmc.Engine(built(plan)) as found:
            yield found


@pytest.mark.parametrize(
    ("count", "prefix_cache"),
    [
        (40, True),
        pytest.param(2000, True, marks=pytest.mark.slow),
        pytest.param(2000, False, marks=pytest.mark.slow),
    ],
)
def test_a_storm_answers_as_if_alone(
    engine: hmc.Engine, prefix_cache: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, kv = random.Random(count), engine.executor.kv
    texts = prompts(24, 180, CONFIG["vocab_size"])
    made = [(ids, 4 + 13 * n % 120) for n, ids in enumerate(texts)]
    alone = [engine.generate(ids, max_new_tokens=new, temperature=0).token_ids for ids, new in made]
    if not prefix_cache:
        monkeypatch.setattr(kv, "adopt", lambda *_: 0)
    accepted: list[tuple[Ticket, int]] = []
    with crowded(kv, 8), Scheduler(engine.executor, max_queue=20) as scheduler:
        for number in range(count):
            which = rng.randrange(len(made))
            while True:
                try:
                    ticket = scheduler.submit(request(*made[which]))
                    break
                except QueueFullError:
                    accepted[-rng.randrange(1, 20)][0].wait(WAIT)
            accepted.append((ticket, which))
            if number % 3 == 0:
                rng.choice(accepted[-20:])[0].cancel()
        reasons = []
        for ticket, which in accepted:
            assert ticket.wait(WAIT)
            found = ticket.result()
            reasons.append(found.finish_reason)
            whole = found.finish_reason != "cancelled"
            assert found.token_ids == alone[which][: None if whole else len(found.token_ids)]
        stats = scheduler.stats()
    assert {"cancelled", "length"} <= set(reasons)
    assert stats.preemptions > 0 or count < 1000
    assert (stats.prefix_hits > 0) == prefix_cache
    assert kv.allocator.used == 0 and kv.rows_free == engine.plan.limits.max_batch
    assert len(kv.snapshots) + kv.snapshots.free == SNAPSHOTS
    assert (stats.running, stats.prefilling, stats.waiting) == (0, 0, 0)


def test_choices_of_a_prompt_have_states_of_their_own(engine: hmc.Engine) -> None:
    """Each goes on from a copy of what the first one left at the end of its last page."""
    kv, ids, new = engine.executor.kv, ids_of(200, 4), 30
    alone = engine.generate(ids, max_new_tokens=new, temperature=0).token_ids
    with Scheduler(engine.executor) as scheduler:
        before = scheduler.stats().prefix_tokens
        tickets = [scheduler.submit(request(ids, new)) for _ in range(4)]
        assert all(ticket.wait(WAIT) for ticket in tickets)
        assert [ticket.result().token_ids for ticket in tickets] == [alone] * 4
        assert scheduler.stats().prefix_tokens - before >= 3 * 192
    assert kv.allocator.used == 0
