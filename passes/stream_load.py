"""Streams every weight once through the GPUs while they compute: phase `prefill.stream`.

Contract
    * requires "plan"; establishes "streamed". Without a GPU budget, or with every expert resident,
      nothing changes
    * the whole prompt passes each layer once. Weights are read from the one host copy
    * ordinary tensors (attention, shared experts, routers) are loaded a sub-layer at a time into
      two alternating slots, one ahead; experts in groups into a ring of slots that crosses layers.
      A load waits for the OFF event of its slot (its last use), a use for the ON event (its load)
    * resident experts are computed where they are and never loaded
    * with R GPUs each rank holds 1/R of the tokens (zig-zag: of 2R pieces r and 2R - 1 - r).
      Latents are exchanged before attention; around the experts the unsorted rows are gathered,
      every rank routes all of them, computes its own experts and sends partial sums back: one
      gather and one exchange a layer, less than dispatch and combine while R <= top_k
    * with several GPUs also phase `prefill.beside`: the same through the last GPU alone, whose new
      cache rows go to gpu0 by way of the host, so that gpu0 and the CPU decode meanwhile
    * what is streamed to gpu0 lies where decode has its dense weights, unless all fits beside them;
      they are loaded again at the end (hmc/device_memory.py)
    * `Plan.switches` says from which prompt length on the phase is the faster one

Method
    1. ring: as asked for; else a layer's experts, halved until the longest prompt's activations
       fit, down to 2
    2. walk the steps of `prefill.host`; emit for every rank loads, computation and exchanges
    3. tokens one call can take: what memory is left for activations
    4. switch-over: bisect the prompt length at which the cost model's timelines cross
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch.fx

from hmc.cost import Call, CostModel
from hmc.device_memory import expert_bytes
from hmc.passes.context import Context
from hmc.passes.kernel_choice import PREFILL
from hmc.passes.stream_emit import (
    BESIDE,
    STREAM,
    StreamEmitter,
    ring_turns,
    streamed_experts,
)
from hmc.passes.stream_memory import StreamMemory
from hmc.plan import Phase, Plan, Switch
from hmc.timeline import host_prefill, result_seconds, run


@dataclass(frozen=True)
class StreamLoad:
    """Adds `prefill.stream` to `context.plan`, and its switch-over point."""

    name: ClassVar[str] = "stream_load"
    requires: ClassVar[frozenset[str]] = frozenset({"plan"})
    establishes: ClassVar[frozenset[str]] = frozenset({"streamed"})

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        plan, budget = context.plan, context.budget
        assert plan is not None
        hosted = any("host" in placement.tiers for placement in plan.placement)
        if budget is None or not hosted:
            return
        gpus = tuple(range(len(budget.usable)))
        beside = gpus[-1:]  # streams a prompt while gpu0 decodes
        if len(gpus) > 1 and (plan.machine.rates is None or plan.machine.rates.link is None):
            context.decide(
                self.name, STREAM, "one GPU", "the machine declares no link rate between its GPUs"
            )
            gpus = gpus[:1]
        phase = self._fitted(context, plan, StreamMemory.of(plan, budget, gpus), STREAM)
        if phase is None:
            return
        phases = [phase]
        if beside != (0,):
            second = self._fitted(context, plan, StreamMemory.of(plan, budget, beside), BESIDE)
            phases += [] if second is None else [second]
        plan = plan.model_copy(update={"phases": (*plan.phases, *phases)})
        context.plan = self._switched(context, plan, phase).model_copy(
            update={"decisions": tuple(context.decisions)}
        )

    def _fitted(
        self, context: Context, plan: Plan, memory: StreamMemory, name: str
    ) -> Phase | None:
        """The phase with the longest ring with which the longest prompt takes as few calls as with
        the shortest."""
        gpus, held = memory.gpus, expert_bytes(plan)
        streamed = max(len(streamed_experts(plan, layer, 0, gpus)) for layer in held)
        wanted = plan.limits.max_context
        asked = min(context.options.ring, streamed)
        emitter = StreamEmitter(
            context.bases[PREFILL], plan, memory.streams_dense, gpus, asked or streamed, name
        )
        phase = emitter.emit()
        calls = -(-wanted // max(1, memory.tokens(phase, 2)))
        ring = phase.ring
        while not asked and ring > 2 and wanted > calls * memory.tokens(phase, ring):
            ring = max(2, ring // 2)
        tokens = memory.tokens(phase, ring)
        if ring != phase.ring:
            phase = replace(emitter, ring=ring).emit()
        if tokens < plan.limits.max_chunk:
            context.decide(
                self.name,
                name,
                "not emitted",
                f"a ring of {ring} experts leaves room for a prompt of {tokens} tokens;"
                f" {memory.reason(phase)}",
            )
            return None
        tokens = min(tokens, max(wanted, plan.limits.max_chunk))
        each = "each GPU" if len(gpus) > 1 else f"gpu{gpus[0]}"
        context.decide(
            self.name,
            f"ring of {name}",
            f"{ring} of the {streamed} experts a layer streams to {each},"
            f" {ring * max(held.values()) / 1e9:.1f} GB in loads of {ring_turns(ring)[0]}",
            f"prompts up to {tokens} tokens fit beside it ({wanted} wanted);"
            f" {memory.reason(phase)}",
        )
        return phase.model_copy(update={"max_tokens": tokens})

    def _switched(self, context: Context, plan: Plan, phase: Phase) -> Plan:
        """The plan with the prompt length from which on streaming is faster."""
        model = CostModel(plan)
        host = plan.phase(PREFILL)
        # a chunk's time grows linearly with the context before it: two points tell the rest
        far = max(plan.limits.max_context, 2 * host.max_tokens)
        low, high = (
            result_seconds(host, run(host, Call(host.max_tokens, at), model)) for at in (0, far)
        )

        def on_host(tokens: int) -> float:
            return sum(
                (low + (high - low) * call.context / far) * call.tokens / host.max_tokens
                for call in host_prefill(host, tokens, model)
            )

        def streamed(tokens: int) -> float:
            return result_seconds(phase, run(phase, Call(tokens), model)) + prefill_seconds(plan)

        first, last = 0, phase.max_tokens // 64
        if streamed(last * 64) >= on_host(last * 64):
            context.decide(
                self.name,
                "switch-over",
                f"{PREFILL} for every prompt",
                f"at {last * 64} tokens streaming takes {streamed(last * 64):.2f} s, the host"
                f" {on_host(last * 64):.2f} s",
            )
            return plan
        while last - first > 1:
            middle = (first + last) // 2
            if streamed(middle * 64) < on_host(middle * 64):
                last = middle
            else:
                first = middle
        tokens = last * 64
        context.decide(
            self.name,
            "switch-over",
            f"{STREAM} from {tokens} prompt tokens on",
            f"streaming takes {streamed(tokens):.2f} s there and {PREFILL} {on_host(tokens):.2f} s;"
            f" at twice the length {streamed(min(2 * tokens, phase.max_tokens)):.2f} s and"
            f" {on_host(min(2 * tokens, phase.max_tokens)):.2f} s",
        )
        switches = (
            Switch(kind="prefill", phase=PREFILL, tokens=1),
            Switch(kind="prefill", phase=STREAM, tokens=tokens),
        )
        return plan.model_copy(update={"switches": (*plan.switches, *switches)})


def prefill_seconds(plan: Plan) -> float:
    """What the machine adds to every streamed prefill."""
    rates = plan.machine.rates
    return 0.0 if rates is None or rates.prefill is None else rates.prefill.value
