"""Prefill and decode in two processes over one copy of the weights and one cache: whether that
helps here, on which cores, and everything it takes under one roof; hides predictions and who owns
what.

    decision = decide(plan, "auto", machine=machine)
    with Disaggregated(plan, division=decision.division) as both:
        scheduler = Scheduler(both.engine.executor, prefill=both.worker)

The weights stay in the page cache where there are shards to map: all processes share it already,
nothing is copied and the start is instant; a memory file would take its memory beside it. Dummies
have no shards, so they are in one.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Unpack

from hmc.closing import Closing
from hmc.errors import MachineError, UsageError
from hmc.machine.model import Machine
from hmc.machine.topology import Topology, this_machine
from hmc.plan import Plan
from hmc.plan.phases import in_own_process, prefill_phase
from hmc.predict.disaggregation import Load, Outlook, divided, interleaved
from hmc.runtime.engine import Engine
from hmc.runtime.executor import ExecutorOptions
from hmc.runtime.memory.kv import KVCache, cache_bytes
from hmc.runtime.memory.shared import SharedBlock
from hmc.runtime.prefill.worker import PrefillWorker

Mode = Literal["auto", "on", "off"]

_BATCH = 2
_EIGHTHS = 8

_TPOT_GAIN, _ALONE_LOSS, _TTFT_LOSS = 0.8, 1.1, 1.5
"""A division helps where those that decode beside a prompt wait at most 0.8 times as long for a
token as between chunks, without a prompt at most 1.1 times as long as on all cores, and a prompt at
most 1.5 times as long as by chunks."""


@dataclass(frozen=True)
class Division:
    """The CPUs of either side, one worker each."""

    decode: tuple[int, ...]
    prefill: tuple[int, ...]


@dataclass(frozen=True)
class Decision:
    """`division` is None for one process; `reason` says why in one line."""

    division: Division | None
    reason: str


def decide(
    plan: Plan,
    mode: Mode,
    *,
    machine: Machine | None,
    threads: int | None = None,
    prefill_threads: int | None = None,
    topology: Topology | None = None,
) -> Decision:
    """Whether a process of its own computes long prompts, and on which of `threads` CPUs (default:
    `Plan.workers`): `prefill_threads` of them, or as many as promise most by the rates of `machine`
    (None: unknown; half of them then).

    Raises `UsageError` for what cannot be had, `MachineError` for "on" with less than two cores.
    """
    if mode == "off":
        return Decision(None, "prefill process: off, as asked for")
    useless = _useless(plan)
    total = threads or plan.workers
    if mode == "auto" and (useless or total < 2):
        return Decision(None, f"prefill process: no, {useless or 'there is one thread'}")
    if useless:
        raise UsageError(f"--prefill-process on: {useless}")
    if prefill_threads is not None and not 0 < prefill_threads < total:
        raise UsageError(
            f"--prefill-threads {prefill_threads}: at least one of the {total} threads must be"
            " left to either side"
        )
    counts = [prefill_threads] if prefill_threads else _candidates(total)
    if machine is None or machine.rates is None:
        if mode == "auto":
            return Decision(
                None,
                "prefill process: no, whether it helps cannot be predicted without the machine's"
                " rates (`hmc probe` measures them)",
            )
        count = prefill_threads or total // 2
        found = divide_cpus(topology or this_machine(), total, count / total)
        return Decision(found, f"prefill process: on, as asked for; {_cpus(found)}")
    load = Load(
        plan.goals.ttft_prompt or plan.limits.max_context // 2, min(_BATCH, plan.limits.max_batch)
    )
    of = max(total, machine.cores)
    now = interleaved(plan, machine, load, cores=total, of=of)
    outlooks = [
        (divided(plan, machine, load, decode=total - n, prefill=n, of=of), n) for n in counts
    ]
    helping = [(then, n) for then, n in outlooks if _worst(now, then) <= 1]
    then, count = min(helping or outlooks, key=lambda each: (_worst(now, each[0]), each[1]))
    what = f"{_told(load, now, then)} (predicted)"
    if mode == "auto" and not helping:
        return Decision(None, f"prefill process: no, with {count} of {total} threads {what}")
    found = divide_cpus(topology or this_machine(), total, count / total)
    asked = ", as asked for" if mode == "on" else ""
    return Decision(found, f"prefill process: on{asked}; {_cpus(found)}; {what}")


class Disaggregated(Closing):
    """An engine, and with a `division` the prefill process beside it. A context manager; `close`
    gives everything back, in order.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: str | Path | None = None,
        *,
        division: Division | None,
        silence: float = 300.0,
        **options: Unpack[ExecutorOptions],
    ) -> None:
        """Returns before the process is ready: see `worker.wait_ready`; one that is not heard of
        for `silence` seconds while it has a prompt is replaced. `options` are `Engine`'s;
        with a `division`, which says the threads and where weights live, `dummy_weights` and
        `progress` alone. Raises what `Engine` and `PrefillWorker` raise.
        """
        self.worker: PrefillWorker | None = None
        with ExitStack() as stack:
            if division is None:
                self.engine = Engine(plan, checkpoint, **options)
                stack.callback(self.engine.close)
            else:
                dummy = options.get("dummy_weights", False)
                cache = SharedBlock(cache_bytes(plan.kv), "KV cache")
                kv = KVCache(plan.kv, plan.limits.max_context, cache)
                stack.callback(kv.close)
                self.engine = Engine(
                    plan,
                    checkpoint,
                    cpus=division.decode,
                    kv=kv,
                    dummy_weights=dummy,
                    home="shared" if dummy else "mapped",
                    progress=options.get("progress"),
                )
                stack.callback(self.engine.close)
                self.worker = PrefillWorker(
                    plan,
                    Path(checkpoint or plan.checkpoint.path),
                    self.engine.executor.store,
                    cache,
                    cpus=division.prefill,
                    silence=silence,
                )
                stack.callback(self.worker.close)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """End the process, then free what both use; a second call does nothing."""
        self._stack.close()


def _useless(plan: Plan) -> str:
    """Why no prompt of this plan would go to a prefill process; "" when some do."""
    longest = plan.limits.max_context
    phase = prefill_phase(plan, longest)
    if in_own_process(plan, phase, longest, every=False):
        return ""
    if longest <= plan.limits.max_chunk:
        return f"a whole context of {longest} tokens fits one chunk"
    return f"the plan computes long prompts in {phase}, on GPUs"


def _candidates(total: int) -> list[int]:
    """Counts of prefill threads to compare, an eighth of all apart."""
    shares = range(1, _EIGHTHS)
    return sorted({min(total - 1, max(1, round(total * each / _EIGHTHS))) for each in shares})


def _worst(now: Outlook, then: Outlook) -> float:
    """The figure that comes closest to its bound, or exceeds it most, as a ratio to it."""
    return max(
        then.tpot / (_TPOT_GAIN * now.tpot),
        then.tpot_alone / (_ALONE_LOSS * now.tpot_alone),
        then.ttft / (_TTFT_LOSS * now.ttft),
    )


def _cpus(division: Division) -> str:
    return f"{len(division.decode)} threads decode, {len(division.prefill)} prefill"


def _told(load: Load, now: Outlook, then: Outlook) -> str:
    return (
        f"{load.batch} sequences beside a prompt of {load.prompt} tokens get a token every"
        f" {1e3 * then.tpot:.3g} ms instead of {1e3 * now.tpot:.3g} by chunks, without a prompt"
        f" every {1e3 * then.tpot_alone:.3g} instead of {1e3 * now.tpot_alone:.3g}; the prompt"
        f" takes {then.ttft:.3g} s instead of {now.ttft:.3g}"
    )


def divide_cpus(topology: Topology, threads: int, share: float) -> Division:
    """The CPUs that `threads` workers would take, divided; `share` of the cores, 0 to 1, go to
    prefill, at least one to either side.

    SMT siblings stay on one side. Both sides get their part of every NUMA node, as far as whole
    cores allow: each then reads weights with the bandwidth of all nodes. A node's CPUs are next to
    each other, as a pool expects. `MachineError` when there are fewer than two cores.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, not {share}")
    chosen = set(topology.worker_cpus(threads))
    nodes = [
        [mine for core in node.cores if (mine := [cpu for cpu in core if cpu in chosen])]
        for node in topology.nodes
    ]
    cores = sum(map(len, nodes))
    if cores < 2:
        raise MachineError(
            f"a prefill process beside decoding needs two cores, {cores} can be used: give more"
            " threads, or prefill and decode in one process"
        )
    counts = _apportion([len(node) for node in nodes], max(1, min(cores - 1, round(share * cores))))
    decode = [core for node, count in zip(nodes, counts, strict=True) for core in node[count:]]
    prefill = [core for node, count in zip(nodes, counts, strict=True) for core in node[:count]]
    return Division(_flat(decode), _flat(prefill))


def _apportion(sizes: list[int], wanted: int) -> list[int]:
    """`wanted` split in proportion to `sizes`, whole; the largest remainders are rounded up."""
    total = sum(sizes)
    counts = [wanted * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-(wanted * sizes[i] % total), i))
    for i in order[: wanted - sum(counts)]:
        counts[i] += 1
    return counts


def _flat(cores: list[list[int]]) -> tuple[int, ...]:
    return tuple(cpu for core in cores for cpu in core)
