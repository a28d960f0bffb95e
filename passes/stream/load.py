"""Streams every weight once through the GPUs while they compute: phase `prefill.stream`.

Contract
    * without a GPU budget, or with every expert resident or in a format that kernels of GPUs cannot
      read, nothing changes
    * the whole prompt passes each layer once. Weights are read from the one host copy
    * ordinary tensors (attention, shared experts, routers) are loaded a sub-layer at a time into
      two alternating slots, one ahead; experts in groups into a ring of slots that crosses layers.
      A load waits for the OFF event of its slot (its last use), a use for the ON event (its load)
    * resident experts are computed where they are and never loaded
    * with R GPUs each rank holds 1/R of the tokens (zig-zag: of 2R pieces r and 2R - 1 - r).
      Latents are exchanged before attention; around the experts the unsorted rows are gathered,
      every rank routes all of them, computes its own experts and sends partial sums back: one
      gather and one exchange a layer, less than dispatch and combine while R <= top_k
    * where the longest prompt leaves room for a short ring only, shorter ones have a phase of their
      own with a longer one, `prefill.stream.<tokens>`; where prompts are worth streaming that are
      too short to choose nearly all experts, `prefill.stream.chosen` loads those chosen alone
    * with several GPUs also phase `prefill.beside`: the same through the last GPU alone, whose new
      cache rows go to gpu0 by way of the host, so that gpu0 and the CPU decode meanwhile
    * what is streamed to gpu0 lies where decode has its dense weights, unless all fits beside them;
      they are loaded again at the end (hmc/plan/memory.py)
    * `Plan.switches` says from which prompt length on the phase is the faster one

Method
    1. ring: as asked for; else a layer's experts, halved until the longest prompt's activations
       fit, down to 2
    2. walk the steps of `prefill.host`; emit for every rank loads, computation and exchanges
    3. tokens one call can take: what memory is left for activations
    4. longer rings, and loading chosen experts alone, where the cost model finds them faster
    5. switch-over: the prompt length at which the cost model's timelines cross
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from hmc.ops.matmul import distinct_experts
from hmc.passes.records import Base, Notes
from hmc.passes.stream.emit import StreamEmitter
from hmc.passes.stream.memory import StreamMemory
from hmc.passes.stream.switch import STEP, PrefillTimes
from hmc.plan import Phase, Plan, Switch
from hmc.plan.phases import BESIDE, CHOSEN, PREFILL, STREAM

_LENGTHS = tuple(1024 * tokens for tokens in (4, 8, 16, 24, 32, 48, 64, 96))
"""Prompts by which rings are compared."""
_FEW = 4
"""Steps of prompt lengths where not all experts are chosen yet."""
WORTHWHILE = 1.03
"""Predicted speed-up from which on another phase for some prompts is worth its place."""


@dataclass(frozen=True)
class StreamLoad:
    """Adds `prefill.stream`, with slots for `ring` experts (0: as many as pay), and its switch-over
    point.
    """

    name: ClassVar[str] = "stream_load"

    ring: int = 0

    def run(self, plan: Plan, base: Base) -> Plan:
        budget, notes = base.budget, Notes(self.name)
        hosted = any("host" in placement.tiers for placement in plan.placement)
        if budget is None or not hosted or base.needs.experts_unread:
            return plan
        gpus = tuple(range(len(budget.usable)))
        beside = gpus[-1:]  # streams a prompt while gpu0 decodes
        if len(gpus) > 1 and (plan.machine.rates is None or plan.machine.rates.link is None):
            notes.decide(STREAM, "one GPU", "the machine declares no link rate between its GPUs")
            gpus = gpus[:1]
        if beside != (0,) and plan.kv.bytes_per_sequence:
            notes.decide(
                STREAM,
                "one GPU",
                "layers keep states a sequence, which tokens change one after the other and which"
                " gpu0 alone has: prompts are neither shared between GPUs nor computed elsewhere",
            )
            gpus = beside = (0,)
        memory = StreamMemory.of(plan, budget, gpus)
        emitter = StreamEmitter(base.plan.phase(PREFILL), plan, memory.streams_dense, gpus)
        streams = _Streams(notes, memory, emitter, self.ring)
        phase = streams.fitted()
        if phase is None:
            return notes.on(plan)
        added, switches = streams.all_of(phase)
        if beside != (0,):
            alone = StreamMemory.of(plan, budget, beside)
            emitter = replace(emitter, streams_dense=alone.streams_dense, gpus=beside, name=BESIDE)
            second = _Streams(notes, alone, emitter, self.ring).fitted()
            added += [] if second is None else [second]
        return notes.on(plan, phases=(*plan.phases, *added), switches=(*plan.switches, *switches))


@dataclass
class _Streams:
    """The phases that stream through some GPUs, with a ring as asked for (0: not)."""

    notes: Notes
    memory: StreamMemory
    emitter: StreamEmitter
    asked: int

    def all_of(self, phase: Phase) -> tuple[list[Phase], tuple[Switch, ...]]:
        """The phase for the longest prompts and those for shorter ones, and where they begin."""
        self.times = times = PrefillTimes(self.memory.plan)
        longer = self._longer_ring(phase)
        streams = [phase] if longer is None else [longer, phase]
        first = times.crossing(streams[0])
        if first:
            chosen = self._chosen_alone(streams[0], first)
            if chosen is not None:
                streams.insert(0, chosen)
                first = times.crossing(chosen, _FEW)
        return streams[::-1], self._switches(streams, first)

    def fitted(self) -> Phase | None:
        """The phase with the longest ring with which the longest prompt takes as few calls as with
        the shortest."""
        notes, memory, emitter = self.notes, self.memory, self.emitter
        limits, name = memory.plan.limits, emitter.name
        streamed, wanted = memory.streamed, limits.max_context
        asked = min(self.asked, streamed)
        phase = replace(emitter, ring=asked or streamed).emit()
        calls = -(-wanted // max(1, memory.tokens(phase, 2)))
        ring = phase.ring
        while not asked and ring > 2 and wanted > calls * memory.tokens(phase, ring):
            ring = max(2, ring // 2)
        tokens = memory.tokens(phase, ring)
        if ring != phase.ring:
            phase = replace(emitter, ring=ring).emit()
        if tokens < limits.max_chunk:
            notes.decide(
                name,
                "not emitted",
                f"a ring of {ring} experts leaves room for a prompt of {tokens} tokens;"
                f" {memory.reason(phase)}",
            )
            return None
        tokens = min(tokens, max(wanted, limits.max_chunk))
        notes.decide(
            f"ring of {name}",
            memory.ring_text(ring),
            f"prompts up to {tokens} tokens fit beside it ({wanted} wanted);"
            f" {memory.reason(phase)}",
        )
        return phase.model_copy(update={"max_tokens": tokens})

    def _longer_ring(self, base: Phase) -> Phase | None:
        """The phase for prompts short enough to leave room for a longer ring, where that is faster:
        with a short one loads wait for attention, whose layer they cannot be ahead of."""
        memory, times, rings = self.memory, self.times, []
        ring = base.ring
        while ring < memory.streamed and not self.asked:
            ring = min(memory.streamed, 2 * ring)
            most = min(memory.tokens(base, ring), base.max_tokens)
            rings.append((ring, most // 1024 * 1024 or most))
        before = times.stalled(base, _LENGTHS, WORTHWHILE) if rings else {}
        best, found, saved = 0.0, None, ""
        for ring, most in rings:
            if not (lengths := [tokens for tokens in before if tokens <= most]):
                continue
            phase = replace(self.emitter, ring=ring, name=f"{STREAM}.{most}").emit()
            after = {tokens: times.streamed(phase, tokens) for tokens in lengths}
            gains = {tokens: before[tokens] / after[tokens] for tokens in lengths}
            total = sum(gain - 1 for gain in gains.values())
            if max(gains.values()) >= WORTHWHILE and total > best:
                best, found = total, phase.model_copy(update={"max_tokens": most})
                saved = "; ".join(
                    f"{tokens} tokens take {after[tokens]:.2f} s instead of {before[tokens]:.2f} s"
                    for tokens in lengths
                )
        if found is not None:
            self.notes.decide(f"ring of {found.name}", memory.ring_text(found.ring), saved)
        return found

    def _chosen_alone(self, every: Phase, last: int) -> Phase | None:
        """The phase that loads only experts some token chose, where prompts are worth streaming
        that are too short to choose nearly all of them: of fewer than `last` tokens, from which on
        `every` expert may as well be loaded. Its loads wait for the router, so the link is idle
        meanwhile."""
        notes, times, model = self.notes, self.times, self.memory.plan.model
        link = times.link_seconds(every)
        lengths = range(_FEW, last, _FEW)
        share = {
            tokens: distinct_experts(model.experts, model.top_k, tokens) / model.experts
            for tokens in (*lengths, last)
        }
        subject, choice = "loading chosen experts alone", "no phase of its own"
        if not any(
            WORTHWHILE * share[tokens] * link < min(link, times.host(tokens)) for tokens in lengths
        ):
            reason = (
                f"prompts of {last} tokens, the shortest worth streaming, choose {share[last]:.1%}"
                " of a layer's experts; shorter ones are computed sooner on the host"
            )
            notes.decide(subject, choice, reason)
            return None
        phase = replace(self.emitter, ring=every.ring, name=CHOSEN, chosen=True).emit()
        phase = phase.model_copy(update={"max_tokens": every.max_tokens})
        first = times.crossing(phase, _FEW)
        end = times.overtaken(phase, every, first, _FEW) if first else 0
        gains = {
            tokens: min(times.host(tokens), times.streamed(every, tokens))
            / times.streamed(phase, tokens)
            for tokens in lengths
            if first <= tokens <= end
        }
        best = max(gains, key=lambda tokens: gains[tokens], default=0)
        if not best or gains[best] < WORTHWHILE:
            reason = f"{PREFILL} below {last} tokens and loading all from there on is as fast"
            notes.decide(subject, choice, reason)
            return None
        reason = (
            f"{best} tokens choose {share[best]:.1%} of a layer's experts and take"
            f" {times.streamed(phase, best):.2f} s; {PREFILL} takes {times.host(best):.2f} s, with"
            f" all experts loaded it is {times.streamed(every, best):.2f} s"
        )
        notes.decide(subject, f"from {first} to {end} tokens", reason)
        return phase.model_copy(update={"max_tokens": end})

    def _switches(self, streams: list[Phase], first: int) -> tuple[Switch, ...]:
        """From how many tokens on each phase is used: streamed ones, which take ever longer
        prompts, from `first` on; none where the host is always faster (0)."""
        notes, times, phase = self.notes, self.times, streams[0]
        if not first:
            most = phase.max_tokens // STEP * STEP
            notes.decide(
                "switch-over",
                f"{PREFILL} for every prompt",
                f"at {most} tokens streaming takes {times.streamed(phase, most):.2f} s, the host"
                f" {times.host(most):.2f} s",
            )
            return ()
        twice = min(2 * first, phase.max_tokens)
        notes.decide(
            "switch-over",
            f"{phase.name} from {first} prompt tokens on",
            f"streaming takes {times.streamed(phase, first):.2f} s there and {PREFILL}"
            f" {times.host(first):.2f} s; at twice the length {times.streamed(phase, twice):.2f} s"
            f" and {times.host(twice):.2f} s",
        )
        starts = [first, *(max(first, each.max_tokens + 1) for each in streams[:-1])]
        return (
            Switch(kind="prefill", phase=PREFILL, tokens=1),
            *(
                Switch(kind="prefill", phase=each.name, tokens=tokens)
                for each, tokens in zip(streams, starts, strict=True)
            ),
        )
