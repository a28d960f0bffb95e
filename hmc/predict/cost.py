"""What a step costs: bytes by tier, FLOPs by format, launches, and from them seconds on a machine.

The one place for formulas: passes use them to decide, `hmc simulate` to predict. Each function says
how its formula is derived. T tokens of a call belong to S sequences of `context` earlier tokens
each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise

from hmc.errors import MachineError
from hmc.formats import format_of
from hmc.machine.model import CpuRates, GpuRates, Machine, Rate
from hmc.ops import OPS, Load
from hmc.ops.matmul import chosen_experts
from hmc.ops.screen import COMPACT
from hmc.plan import DTYPE_BYTES, Phase, Plan, Step
from hmc.plan.nodes import shares, strangers

TRANSFERS = ("h2d", "d2h")

COPY_PIECE = 16 << 20
"""Bytes of one copy of weights to a GPU: longer loads are cut, so that others get in between."""


@dataclass(frozen=True)
class Call:
    """One call of a phase: `tokens` in all, evenly of `sequences`, each with `context` tokens
    before. Without `logits` (all chunks of a prompt but the last) the steps behind the last layer
    do not run.
    """

    tokens: int
    context: int = 0
    sequences: int = 1
    logits: bool = True


@dataclass(frozen=True)
class Cost:
    """What one step takes: `bytes` by tier ("host", "remote": those of them that cross between NUMA
    nodes, "gpu", "link", "pcie"), `flops` by format, `launches` of kernels (records on the CPU),
    `seconds`, and which of them binds; `handed_over` seconds of the thread that gives the step to
    its device.
    """

    seconds: float
    bound: str
    bytes: Mapping[str, float] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    launches: int = 0
    handed_over: float = 0.0


def _rate(rate: Rate | None, default: float) -> float:
    return default if rate is None else rate.value


_TERMS = 2
"""FP8 numbers whose sum a bf16 operand is, where a GPU multiplies in FP8."""
_TERM_BYTES = 2 + 2 * _TERMS * (1 + 4 / 128)
"""Bytes of an element of such an operand: read in bf16, its terms with a scale for every 128 of
them written and read."""


def declared_as(rates: CpuRates, form: str) -> str:
    """The format whose rates count for `form`: itself, or where the machine declares none for it
    the one with the nearest number of bits a weight (of two such the smaller one).
    """
    declared = {point.format for point in rates.gemv}
    if form in declared:
        return form
    bits = format_of(form).weight_bits

    def distance(other: str) -> tuple[float, float]:
        own = format_of(other).weight_bits
        return abs(own - bits), own

    if not declared:
        raise MachineError("the machine declares no gemv rates: `hmc probe` measures them")
    return min(sorted(declared), key=distance)


def gemv_rate(rates: CpuRates, form: str, tokens: float) -> float:
    """Weight bytes/s of decode matmuls in a format (see `declared_as`) at `tokens` tokens a call,
    between the measured points linearly, beyond them as the nearest.
    """
    form = declared_as(rates, form)
    points = sorted(
        (point.tokens, point.rate.value) for point in rates.gemv if point.format == form
    )
    if tokens <= points[0][0]:
        return points[0][1]
    for (low, slow), (high, fast) in pairwise(points):
        if tokens <= high:
            return slow + (fast - slow) * (tokens - low) / (high - low)
    return points[-1][1]


def expert_rate(rates: CpuRates, form: str, tokens: float) -> float:
    """Weight bytes/s of routed experts in decode at `tokens` tokens a call: the gemv rate, times
    what one token's experts reach of one token's gemv. Many small matrices that begin and end run
    slower than a large one.
    """
    form = declared_as(rates, form)
    own = next((each.rate.value for each in rates.experts if each.format == form), None)
    share = 1.0 if own is None else own / gemv_rate(rates, form, 1)
    return share * gemv_rate(rates, form, tokens)


def cpu_expert_seconds(rates: CpuRates, form: str, size: float, tokens: float = 1) -> float:
    """One routed expert of `size` bytes on the CPU in decode: its bytes at the experts' rate and
    the barrier between its halves.
    """
    return size / expert_rate(rates, form, tokens) + _rate(rates.expert, 0.0)


def gpu_expert_seconds(rates: GpuRates, size: float) -> float:
    """One resident expert of `size` bytes in decode: its bytes from device memory (its launches
    are shared by all experts of the step).
    """
    return size / rates.memory.value


@dataclass(frozen=True)
class _Asked:
    """What a step does in a call: bytes of weights, activations and cache, FLOPs on weights and of
    attention, matrices begun, format of the weights. Of a GPU: elements of the operands that are
    multiplied, bytes of temporaries, launches, whether a few tokens.
    """

    weight: float
    flops: float
    moved: float
    cache: float
    scores: float
    pieces: float
    form: str
    operands: float
    made: float
    launches: int
    few: bool

    def cost(self, seconds: float, bound: str, tier: str, launches: int, made: float = 0.0) -> Cost:
        moved = {tier: self.weight + self.moved + self.cache + made}
        return Cost(seconds, bound, moved, {self.form or "f32": self.flops + self.scores}, launches)


class CostModel:
    """Costs of the steps of one plan on its machine (or another one with rates).

    Raises `MachineError` when the machine declares no rates for what a plan uses.
    """

    def __init__(self, plan: Plan, machine: Machine | None = None) -> None:
        self.machine = machine or plan.machine
        self._cpu = self.machine.known_rates
        self._strangers = strangers(shares(self.machine, plan.threads))
        self._format = {weight.name: weight.format for weight in plan.weights}
        for experts in plan.experts:
            self._format[f"layer:{experts.layer}"] = experts.format

    def step(self, phase: Phase, step: Step, call: Call) -> Cost:
        """The cost of a step in a call of its phase.

        A step's time is the largest of its transfers and computations, since a kernel overlaps
        them, plus what each launch takes; in a phase of two lanes, times the machine's slow-down
        of that side while the other one works.
        """
        if not call.logits and step.section == "head":
            return Cost(0.0, "skipped")
        lanes = 1 if "whole" in step.attrs else phase.lanes
        share = int(step.attrs.get("ranks", 1)) * lanes
        if share > 1:
            sequences = -(-call.sequences // lanes)
            tokens = -(-call.tokens // share)
            call = Call(tokens, call.context, sequences, call.logits)
        kind = step.resource.rstrip("0123456789")
        if step.resource == "cpu":
            cost = self._on_cpu(step, phase, call)
            factor = _rate(self._cpu.overlap, 1.0) if lanes > 1 else 1.0
        elif kind == "gpu":
            gpu = self._gpu(step.resource)
            cost = self._on_gpu(step, phase, call, gpu)
            factor = _rate(gpu.overlap, 1.0) if lanes > 1 else 1.0
        elif kind in TRANSFERS:
            return self._transfer(step, phase, call, kind)
        elif kind == "link":
            return self._exchange(step, phase, call)
        else:
            raise MachineError(f"step {step.id}: no machine has a resource {step.resource}")
        return replace(
            cost, seconds=cost.seconds * factor, handed_over=self._thread(step, phase, cost)
        )

    def _thread(self, step: Step, phase: Phase, cost: Cost) -> float:
        """Seconds of the thread that hands a step over: a kernel after the other, but of decode a
        graph, which begins where a step waits, as one."""
        if not step.resource.startswith("gpu"):
            return 0.0
        launches = cost.launches
        if phase.name.startswith("decode") and OPS[step.op].captured:
            launches = 1 if step.waits else 0
        return launches * _rate(self._gpu(step.resource).hand_over, 0.0)

    def _gpu(self, resource: str) -> GpuRates:
        number = int(resource[3:])  # gpu0, h2d0, d2h0
        if number >= len(self.machine.gpus):
            raise MachineError(f"machine {self.machine.name} has no {resource}")
        rates = self.machine.gpus[number].rates
        if rates is None:
            raise MachineError(f"machine {self.machine.name}: gpu{number} declares no rates")
        return rates

    def _work(self, step: Step, phase: Phase, call: Call) -> _Asked:
        """What a compute step does in a call: its row's work, in bytes and FLOPs.

        FLOPs are those of one token times the rows multiplied. Activations are read and written
        once, where the row does not know better.
        """
        row = OPS[step.op]
        load = Load(
            self._rows(step, call),
            call.tokens,
            call.sequences,
            call.context,
            int(step.attrs.get("ranks", 1)),
            lifted=self._many(phase) and step.resource == "cpu",
        )
        work = row.work(step.attrs, load)
        moved = work.moved
        if moved is None:
            sizes = self._widths(phase)
            moved = load.rows * sum(
                operand.width * sizes[operand.buffer]
                for operand in (*step.inputs.values(), *step.outputs.values())
            )
        # a sequence's own states are read and written, whatever its length
        times = {"token": work.keys, "sequence": 2.0 * call.sequences}
        cache = float(sum(times[s.per] * s.bytes for s in row.states(step.attrs)))
        form = next((self._format[name] for name in step.weights.values()), "")
        form = COMPACT if "screen" in step.attrs else form
        weight, flops = step.weight_bytes * work.reads, step.flops * work.products
        operands = load.rows * sum(operand.width for operand in step.inputs.values())
        if row.routed:
            inner = work.products * int(step.attrs["top_k"]) * int(step.attrs["n"])
            operands = load.rows * int(step.attrs["k"]) + inner
        return _Asked(
            weight,
            flops,
            moved,
            cache,
            work.scores,
            work.pieces,
            form,
            operands,
            work.made,
            row.launches(step.attrs, load),
            load.few,
        )

    def _rows(self, step: Step, call: Call) -> float:
        """Rows a step works on: those whose logits are wanted in the head, else all."""
        return float(call.sequences if step.section == "head" else call.tokens)

    @staticmethod
    def _many(phase: Phase) -> bool:
        """Whether a phase has the kernels of many tokens."""
        return phase.name.startswith("prefill")

    def _widths(self, phase: Phase) -> dict[str, int]:
        cached = getattr(self, "_cache", None)
        if cached is None or cached[0] is not phase:
            cached = (phase, {b.name: DTYPE_BYTES[b.dtype] for b in phase.buffers})
            self._cache = cached
        return cached[1]

    def _on_cpu(self, step: Step, phase: Phase, call: Call) -> Cost:
        row, asked, rates = OPS[step.op], self._work(step, phase, call), self._cpu
        read = rates.read_all
        # Tiled kernels stream weights and are bound by their products; those of decode read at
        # the rate of their format.
        many = self._many(phase)
        # Rows of decode's matrices lie where they are multiplied, all else where anybody may be.
        apart = 0.0 if (row.matmul or row.routed) and not many else self._strangers
        slower = 0.0 if rates.remote is None else max(0.0, read / rates.remote.value - 1)
        moved = asked.moved / read * (1 + slower * self._strangers)
        times = {"activations": moved, "compute": asked.flops / rates.dot.value}
        if asked.weight:
            streamed = many or asked.form in ("", "f32", "fp16") or not (row.matmul or row.routed)
            rate = expert_rate if row.routed else gemv_rate
            speed = read if streamed else rate(rates, asked.form, call.tokens)
            times["weights"] = asked.weight / speed * (1 + slower * apart)
        after = 0.0
        if row.attends:
            # What one query of each head reads of the cache leaves no time for more than its
            # products, which run at the matmuls' rate, and so do those of the latent kernel of
            # prefill, which lifts keys and values by the matmuls' tiles. Many plain queries enter
            # in two terms and take exponentials.
            plain = many and not row.weights
            scored = rates.attend.value if plain else rates.dot.value
            if asked.weight:  # absorbing and lifting overlap with nothing else
                after = max(times.values())
                times = {"weights": after}
            times["cache"] = asked.cache / read * (1 + slower * self._strangers)
            times["attention"] = asked.scores / scored
            after = min(after, max(times["cache"], times["attention"]))
        bound = max(times, key=lambda name: times[name])
        launches = max(1, len(step.kernels))
        seconds = times[bound] + after + launches * rates.record.value
        seconds += asked.pieces * _rate(rates.expert, 0.0)
        if step.waits:
            seconds += _rate(rates.handoff, 0.0)
        cost = asked.cost(seconds, bound, "host", launches)
        remote = apart * asked.weight + self._strangers * (asked.moved + asked.cache)
        near = cost.bytes["host"] - remote
        return replace(cost, bytes={"host": near, "remote": remote}) if remote else cost

    def _on_gpu(self, step: Step, phase: Phase, call: Call, rates: GpuRates) -> Cost:
        """Matmuls and what attention makes for itself overlap with nothing else of the step."""
        row, asked = OPS[step.op], self._work(step, phase, call)
        memory, peak, launches = rates.memory.value, rates.bf16.value, asked.launches
        made = asked.made
        if asked.form and row.has_matmul:
            form = format_of(asked.form)
            peak /= form.terms
            if rates.fp8 is not None and "fp8" in form.exact_in and not asked.few:
                peak = rates.fp8.value / _TERMS
                made += asked.operands * _TERM_BYTES
                launches += asked.launches - 2 if row.routed else 1  # one more for each product
        times = {
            "weights": asked.weight / memory,
            "compute": asked.flops / peak,
            "activations": asked.moved / memory,
        }
        seconds = made / memory
        if row.attends:
            scores = max(asked.cache / memory, asked.scores / rates.attention.value)
            times = {"weights": max(times.values()), "attention": scores}
            seconds += min(times.values())
        bound = max(times, key=lambda name: times[name])
        seconds += times[bound] + launches * rates.launch.value
        return asked.cost(seconds, bound, "gpu", launches, made)

    def _transfer(self, step: Step, phase: Phase, call: Call, kind: str) -> Cost:
        """Pinned copies: bytes at the rate of the way (of both ways at once where two lanes keep
        both busy) and the latency of one copy."""
        rates = self._gpu(step.resource)
        alone = rates.h2d if kind == "h2d" else rates.d2h
        both = rates.h2d_both if kind == "h2d" else rates.d2h_both
        speed = both if both is not None and phase.lanes > 1 else alone
        if step.fills:
            moved = float(step.weight_bytes) * self._chosen_share(step, call)
        else:
            sizes = self._widths(phase)
            moved = self._rows(step, call) * sum(
                operand.width * sizes[operand.buffer] for operand in step.inputs.values()
            )
        seconds = moved / speed.value + rates.sync.value
        return Cost(seconds, kind, {"pcie": moved}, {}, 1)

    def _chosen_share(self, step: Step, call: Call) -> float:
        """Of the experts a load is for, those expected to be chosen where it brings only these."""
        if "top_k" not in step.attrs:
            return 1.0
        return chosen_experts(step.attrs, call.tokens) / int(step.attrs["count"])

    def _exchange(self, step: Step, phase: Phase, call: Call) -> Cost:
        """Each rank sends the rows it has to every other: (R - 1) times the bytes of 1/R of the
        call's rows, all ranks at once, staged through the host."""
        ranks = phase.ranks
        if self._cpu.link is None:
            raise MachineError(
                f"machine {self.machine.name} has {len(self.machine.gpus)} GPUs but declares no"
                " link rate between them"
            )
        width = float(step.attrs["bytes"])
        moved = width * -(-call.tokens // ranks) * (ranks - 1)
        seconds = moved / self._cpu.link.value + _rate(self._cpu.link_latency, 0.0)
        return Cost(seconds, "link", {"link": moved}, {}, 1)
