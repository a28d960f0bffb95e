"""Schedules run on the null and the host backend: exact times, order under delays, and faults."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from typing import Any

import pytest
from hybrid_plans import ONE, TWO, plan_for, waits_of, with_phase, without_wait
from null_device import NullBackend
from version_stamps import Stamps

from hmc.errors import CapacityError, ExecutionError, VerifyError, WorkerError
from hmc.plan import Phase, Plan
from hmc.plan.order import check_order
from hmc.plan.verify import verify_plan
from hmc.predict.cost import Call, Cost, CostModel
from hmc.predict.timeline import run, scheduled
from hmc.runtime.devices.host import HostBackend
from hmc.runtime.schedule.runner import ScheduleRunner, part_of_rank

STREAM, DUAL = "prefill.stream", "decode.dual"


def _small(machine: str, layers: int = 2) -> Plan:
    """Streams on one and on two GPUs, and decodes with experts on both sides."""
    return plan_for("qwen3-30b-a3b", machine, layers, vram=2.2, max_context=4096)


def _dual() -> Plan:
    return plan_for("deepseek-v3", ONE, 8, vram=24)


PHASES: dict[str, Callable[[], Phase]] = {
    "stream, one GPU": lambda: _small(ONE).phase(STREAM),
    "stream, two GPUs": lambda: _small(TWO).phase(STREAM),
    "decode": lambda: _small(ONE).phase("decode"),
    "dual": lambda: _dual().phase(DUAL),
}


def _idle(call: Any) -> None:
    """A step that does nothing."""


def _threads() -> list[str]:
    """Threads of streams; other tests of this process may keep an engine, with threads hmc-0..."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if re.fullmatch(r"hmc-(cpu|link|(gpu|h2d|d2h)\d+)", name)]


# -- the null backend: exact times -----------------------------------------------------------------


def _null_times(
    phase: Phase, seconds: list[float]
) -> tuple[tuple[float, ...], tuple[float, ...], ScheduleRunner]:
    runner = ScheduleRunner(phase, NullBackend(2, 0), [_idle] * len(phase.steps), seconds)
    measured = runner.run(None)
    return measured.start, measured.finish, runner


@pytest.mark.parametrize(
    ("plan", "name", "call"),
    [
        (lambda: _small(ONE), STREAM, Call(2048)),
        (lambda: _small(TWO), STREAM, Call(2048)),
        (lambda: _small(ONE), "decode", Call(4, 100, 4)),
        (lambda: _small(TWO), "prefill.host", Call(300)),
        (_dual, DUAL, Call(6, 4096, 6)),
        (lambda: plan_for("deepseek-v3", TWO, 8, vram=24), STREAM, Call(20_000)),
    ],
)
def test_the_null_backend_takes_the_time_of_the_timeline(
    plan: Callable[[], Plan], name: str, call: Call
) -> None:
    model = CostModel(plan())
    phase = plan().phase(name)
    seconds = [cost.seconds for cost in run(phase, call, model).costs]
    expected = scheduled(phase, [Cost(each, "at once") for each in seconds])  # no thread in between
    start, finish, runner = _null_times(phase, seconds)
    assert start == expected.start
    assert finish == expected.finish
    assert runner.run(None).finish == finish  # a second call starts at zero again


def test_a_small_phase_runs_at_the_times_of_the_golden_file(
    golden: Callable[[str, str], None],
) -> None:
    phase = _small(ONE, 1).phase(STREAM)
    seconds = [2.0 if step.op == "load" else 1.0 for step in phase.steps]
    start, finish, _ = _null_times(phase, seconds)
    lines = [
        f"{first:4.0f} {last:4.0f} {step.resource:5} {step.op} {step.attrs.get('range', '')}"
        for step, first, last in zip(phase.steps, start, finish, strict=True)
    ]
    golden("runtime/schedule.txt", "\n".join(line.rstrip() for line in lines) + "\n")


@pytest.mark.slow
@pytest.mark.few(1)
@pytest.mark.parametrize(
    "tokens",
    [*(pytest.param(n, marks=pytest.mark.slow) for n in (1024, 16_384, 32_768)), 4096, 65_536],
)
def test_streaming_takes_the_larger_of_transfer_and_computation(tokens: int) -> None:
    """With a ring of a whole layer, and but for the fill and the drain.

    fill: what precedes the first step on the GPU (embedding, its copy, the first load); and, where
    transfers bind, what the GPU computes before it uses the first streamed expert, less the loads
    that go on meanwhile until the ring is full. drain: what the GPU computes after the last load.
    """
    plan = plan_for("deepseek-v3", ONE, 61, max_context=32_768)
    phase = plan.phase(STREAM)
    assert phase.ring == plan.model.experts
    expected = run(phase, Call(tokens), CostModel(plan))
    seconds = [cost.seconds for cost in expected.costs]
    start, finish, _ = _null_times(phase, seconds)
    steps = list(enumerate(phase.steps))
    loads = [i for i, step in steps if step.resource == "h2d0" and step.op == "load"]
    loads = [i for i in loads if "what" not in phase.steps[i].attrs]  # weights put back afterwards
    computing = [i for i, step in steps if step.resource == "gpu0"]
    transfer = sum(seconds[i] for i in loads)
    compute = sum(seconds[i] for i in computing)
    first = next(i for i in computing if phase.steps[i].op == "experts" and phase.steps[i].uses)
    before = sum(seconds[i] for i in computing if i < first)
    ring = [i for i in loads if phase.steps[i].fills[0].startswith("ring")]
    refill = [i for i in ring if phase.steps[i].fills == phase.steps[ring[0]].fills][1]
    ahead = sum(seconds[i] for i in loads if i < refill)
    lead = start[computing[0]]
    drain = sum(seconds[i] for i in computing if i > loads[-1])
    result = next(
        end
        for step, end in zip(phase.steps, finish, strict=True)
        if any(operand.buffer == "logits" for operand in step.outputs.values())
    )
    assert result == expected.result
    assert result >= max(transfer + drain, lead + compute)
    bound = max(transfer + max(0.0, before - ahead), compute) + lead + drain
    assert result <= 1.02 * bound


# -- the host backend: order -----------------------------------------------------------------------


ALL_SEEDS = int(os.environ.get("HMC_TEST_SEEDS", "300"))
"""Delay patterns of all phases together (give 1000 to search)."""


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("name", "percent"),
    [("stream, one GPU", 30), ("stream, two GPUs", 25), ("decode", 40), ("dual", 5)],
)
def test_every_step_finds_what_it_needs_under_any_delays(name: str, percent: int) -> None:
    seeds = ALL_SEEDS * percent // 100
    phase = PHASES[name]()
    stamps = Stamps(phase)
    works = stamps.works()
    for seed in range(seeds):
        backend = HostBackend(2, 0, delays=seed)
        stamps.reset()
        measured = ScheduleRunner(phase, backend, works).run(None)
        backend.close()
        assert len(measured.finish) == len(phase.steps)
        assert all(0 <= s <= f for s, f in zip(measured.start, measured.finish, strict=True))


@pytest.mark.few(1)
@pytest.mark.parametrize("name", ["stream, one GPU", "stream, two GPUs", "decode"])
def test_a_dropped_wait_lets_a_step_run_too_early(name: str) -> None:
    """What the events keep apart does happen without them: where the step waited for is slow, its
    follower runs ahead, and somebody reads what should not be there."""
    whole = PHASES[name]()
    signallers = {step.signal: i for i, step in enumerate(whole.steps) if step.signal >= 0}
    for at, event in waits_of(whole):
        stamps = Stamps(whole)
        stamps.overtake(slow=signallers[event], ahead=at)
        backend = HostBackend(2, 0)
        runner = ScheduleRunner(without_wait(whole, at, event), backend, stamps.works())
        with pytest.raises(ExecutionError, match="wrote, not step"):
            runner.run(None)


@pytest.mark.parametrize("name", sorted(PHASES))
def test_dropping_any_wait_is_caught_by_verification(name: str) -> None:
    phase = PHASES[name]()
    check_order(phase)
    for at, event in waits_of(phase):
        with pytest.raises(VerifyError, match=rf"phase {phase.name}, step"):
            check_order(without_wait(phase, at, event))


def test_verification_of_a_plan_looks_at_every_phase() -> None:
    plan = _small(TWO)
    verify_plan(plan)
    for phase in plan.phases:
        if not waits_of(phase):
            continue
        at, event = waits_of(phase)[-1]
        broken = with_phase(
            plan, phase.name, lambda each, at=at, event=event: without_wait(each, at, event)
        )
        with pytest.raises(VerifyError, match=rf"phase {phase.name}, step"):
            verify_plan(broken)


def test_a_runner_is_used_call_after_call() -> None:
    phase = PHASES["stream, two GPUs"]()
    stamps = Stamps(phase)
    seen: list[object] = []
    works = stamps.works()
    works[0] = lambda call, work=works[0]: (seen.append(call), work(call))  # type: ignore[misc]
    backend = HostBackend(2, 0, delays=1)
    runner = ScheduleRunner(phase, backend, works)
    for call in range(20):
        stamps.reset()
        (runner.run if call % 2 else runner.run_untimed)(call)
    assert seen == list(range(20))
    backend.close()
    assert not _threads()


# -- ranks -----------------------------------------------------------------------------------------


def test_each_rank_runs_its_own_part() -> None:
    phase = _small(TWO).phase(STREAM)
    parts = [part_of_rank(phase, rank) for rank in (0, 1)]
    for rank, part in enumerate(parts):
        other = 1 - rank
        used = {step.resource for step in part.steps}
        assert not used & {f"gpu{other}", f"h2d{other}", f"d2h{other}"}
        assert sum(step.op == "embed" for step in part.steps) == 1
    links = [[step.id for step in part.steps if step.resource == "link"] for part in parts]
    assert links[0] == links[1] != []
    assert {s.id for part in parts for s in part.steps} == {step.id for step in phase.steps}


def test_ranks_in_lockstep_at_their_exchanges_keep_order() -> None:
    phase = _small(TWO).phase(STREAM)
    barrier = threading.Barrier(2, timeout=10)
    errors: list[BaseException] = []

    def process(rank: int, seed: int) -> None:
        part = part_of_rank(phase, rank)
        stamps = Stamps(part)
        works = list(stamps.works())
        for at, step in enumerate(part.steps):
            if step.resource == "link":
                works[at] = lambda call, work=works[at]: (barrier.wait(), work(call))  # type: ignore[misc]
        backend = HostBackend(2, 0, delays=seed)
        try:
            ScheduleRunner(part, backend, works).run(None)
        except BaseException as error:
            errors.append(error)
            barrier.abort()
        backend.close()

    for seed in range(20):
        threads = [threading.Thread(target=process, args=(r, 2 * seed + r)) for r in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


def test_a_rank_that_lacks_what_it_reads_is_refused() -> None:
    phase = _small(TWO).phase(STREAM)
    with pytest.raises(ExecutionError, match="has 2 rank"):
        part_of_rank(phase, 2)
    steps = tuple(
        step.model_copy(update={"resource": "gpu0"}) if step.resource == "h2d1" else step
        for step in phase.steps
    )
    with pytest.raises(VerifyError):
        part_of_rank(phase.model_copy(update={"steps": steps}), 1)


# -- faults ----------------------------------------------------------------------------------------


def _with_work(phase: Phase, op: str, work: Callable[[Any], None]) -> list[Callable[[Any], None]]:
    works: list[Callable[[Any], None]] = [_idle] * len(phase.steps)
    works[next(i for i, step in enumerate(phase.steps) if step.op == op)] = work
    return works


@pytest.mark.parametrize("op", ["embed", "load", "sort", "experts", "kv_out", "exchange"])
def test_a_step_that_raises_ends_the_run_with_one_error(op: str) -> None:
    phase = _small(TWO).phase(STREAM)

    def broken(call: Any) -> None:
        raise ValueError("nothing is right")

    backend = HostBackend(2, 1 << 20)
    backend.devices[0].allocate(1000, "slots")
    runner = ScheduleRunner(phase, backend, _with_work(phase, op, broken))
    said = rf"phase prefill\.stream, step \d+ \({op}, .*failed on .*ValueError: nothing is right"
    with pytest.raises(ExecutionError, match=said):
        runner.run(None)
    assert not _threads()
    assert backend.devices[0].used == 0
    with pytest.raises(ExecutionError, match=said):  # it stays the first error
        runner.run(None)


def test_out_of_memory_in_a_step_stays_a_capacity_error() -> None:
    phase = _small(ONE).phase(STREAM)
    backend = HostBackend(1, 1 << 20)

    def greedy(call: Any) -> None:
        backend.devices[0].allocate(1 << 21, "scores of attention")

    runner = ScheduleRunner(phase, backend, _with_work(phase, "attention", greedy))
    with pytest.raises(CapacityError, match=r"gpu0 cannot hold scores of attention: 2,097,152"):
        runner.run(None)
    assert not _threads()


def test_a_stuck_step_is_reported_and_not_waited_for() -> None:
    phase = _small(ONE).phase(STREAM)
    release = threading.Event()
    backend = HostBackend(1, 1 << 20, timeout=0.2)
    backend.devices[0].allocate(1000, "slots")
    runner = ScheduleRunner(
        phase, backend, _with_work(phase, "load", lambda call: release.wait(20) and None)
    )
    with pytest.raises(WorkerError, match=r"nothing ended for 0\.2 s: .*h2d0 is at phase"):
        runner.run(None)
    assert _threads() == ["hmc-h2d0"]
    assert backend.devices[0].used == 0
    release.set()
    for thread in threading.enumerate():
        if thread.name == "hmc-h2d0":
            thread.join(5)
    assert not _threads()


def test_a_phase_that_cannot_be_run_is_refused() -> None:
    phase = _small(TWO).phase(STREAM)
    works = [_idle] * len(phase.steps)
    with pytest.raises(ExecutionError, match="are bound"):
        ScheduleRunner(phase, NullBackend(2, 0), works[1:])
    with pytest.raises(ExecutionError, match=r"only 1 GPU\(s\) are open"):
        ScheduleRunner(phase, NullBackend(1, 0), works)
    _, event = waits_of(phase)[0]
    signaller = next(i for i, step in enumerate(phase.steps) if step.signal == event)
    steps = list(phase.steps)
    steps[signaller] = steps[signaller].model_copy(update={"signal": -1})
    silent = phase.model_copy(update={"steps": tuple(steps)})
    with pytest.raises(VerifyError, match=f"waits for event {event}, which nothing signals"):
        ScheduleRunner(silent, NullBackend(2, 0), works)
