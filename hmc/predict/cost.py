"""What a step costs: bytes by tier, FLOPs by format, launches, and from them seconds on a machine.

The one place for formulas: passes use them to decide, `hmc simulate` to predict. Each function says
how its formula is derived. T tokens of a call belong to S sequences of `context` earlier tokens
each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from hmc.errors import MachineError
from hmc.machine import CpuRates, GpuRates, Machine, Rate
from hmc.plan import DTYPE_BYTES, Phase, Plan, Step

TRANSFERS = ("h2d", "d2h")

COPY_PIECE = 16 << 20
"""Bytes of one copy of weights to a GPU: longer loads are cut, so that others get in between."""

GPU_LAUNCHES: dict[str, int] = {"mla": 5, "attention": 3, "experts": 4, "sort": 4, "route": 2}
"""Kernels a GPU needs for a step: latent attention absorbs, appends, scores, joins and lifts;
experts gather, multiply twice and scatter; a sort counts, scans and places. Others: one."""


@dataclass(frozen=True)
class Call:
    """One call of a phase: `tokens` in all, evenly of `sequences`, each with `context` tokens
    before. `profile` (layer -> probability of each expert to be chosen by a token) makes routing
    uneven. Without `logits` (all chunks of a prompt but the last) the steps behind the last layer
    do not run.
    """

    tokens: int
    context: int = 0
    sequences: int = 1
    profile: Mapping[int, Sequence[float]] | None = None
    logits: bool = True


@dataclass(frozen=True)
class Cost:
    """What one step takes: `bytes` by tier ("host", "gpu", "link", "pcie"), `flops` by format,
    `launches` of kernels (records on the CPU), `seconds`, and which of them binds.
    """

    seconds: float
    bound: str
    bytes: Mapping[str, float] = field(default_factory=dict)
    flops: Mapping[str, float] = field(default_factory=dict)
    launches: int = 0


def distinct_experts(experts: int, top_k: int, tokens: float, here: int | None = None) -> float:
    """Expected number of distinct experts that `tokens` tokens choose among `here` of `experts`.

    With even, independent routing a token misses a given expert with probability 1 - k/E, so b
    tokens all miss it with (1 - k/E)^b; the expectation of a sum is the sum of expectations:
    here * (1 - (1 - k/E)^b). For E = 256, k = 8: 8, 15.75, 23.3 for 1, 2, 3 tokens.
    """
    count = experts if here is None else here
    return float(count * (1 - (1 - top_k / experts) ** tokens))


def distinct_of_profile(probabilities: Sequence[float], tokens: float) -> float:
    """`distinct_experts` for uneven routing: the sum of 1 - (1 - p)^b over the experts named."""
    return float(sum(1 - (1 - min(1.0, p)) ** tokens for p in probabilities))


def attended(tokens: float, context: float, sequences: float = 1) -> float:
    """(query, key) pairs of causal attention: the t-th of a sequence's n = T/S new tokens sees
    context + t keys, so S * (n * context + n (n + 1) / 2).
    """
    own = tokens / sequences
    return sequences * (own * context + own * (own + 1) / 2)


def gqa_flops(heads: int, head_dim: int, v_dim: int, pairs: float) -> float:
    """A score takes 2 * head_dim FLOPs a head and pair, its weighted sum of values 2 * v_dim."""
    return 2.0 * heads * (head_dim + v_dim) * pairs


def mla_expanded_flops(
    step: Mapping[str, int | float | str], pairs: float, tokens: float, keys: float
) -> float:
    """Latent attention with keys and values of every head (DeepSeek-V3, arXiv 2412.19437, eq.
    1-11): scores over nope + rope, sums over v_dim, and every key's latent lifted once through
    kv_b: 2 rank (nope + v_dim) a head and key, where the T new ones are counted with the step's
    weights already.
    """
    heads, nope, rope = int(step["heads"]), int(step["nope"]), int(step["rope"])
    v_dim, rank = int(step["v_dim"]), int(step["rank"])
    lifted = 2.0 * heads * rank * (nope + v_dim) * max(0.0, keys - tokens)
    return 2.0 * heads * (nope + rope + v_dim) * pairs + lifted


def mla_flops(
    step: Mapping[str, int | float | str], pairs: float, tokens: float, keys: float
) -> float:
    """Latent attention in the cheaper of its two forms: expanded, or absorbed, where kv_b is moved
    to the query and the result, so that scores run over rank + rope and sums over rank.
    """
    heads, rope, rank = int(step["heads"]), int(step["rope"]), int(step["rank"])
    absorbed = 2.0 * heads * (2 * rank + rope) * pairs
    return min(mla_expanded_flops(step, pairs, tokens, keys), absorbed)


def kv_bytes(width: int, context: float, tokens: float, sequences: float = 1) -> float:
    """Bytes of one layer's cache that a call reads: every sequence its context + T/S rows of
    `width` bf16 elements.
    """
    return 2.0 * width * (sequences * context + tokens)


def _rate(rate: Rate | None, default: float) -> float:
    return default if rate is None else rate.value


def gemv_rate(rates: CpuRates, form: str, tokens: float) -> float:
    """Weight bytes/s of decode matmuls in a format at `tokens` tokens a call, between the measured
    points linearly, beyond them as the nearest; `MachineError` for a format without any.
    """
    points = sorted(
        (point.tokens, point.rate.value) for point in rates.gemv if point.format == form
    )
    if not points:
        raise MachineError(
            f"the machine declares no gemv rate for {form} weights: add one to its rates"
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


class CostModel:
    """Costs of the steps of one plan on its machine (or another one with rates).

    Raises `MachineError` when the machine declares no rates for what a plan uses.
    """

    def __init__(self, plan: Plan, machine: Machine | None = None) -> None:
        self.machine = machine or plan.machine
        if self.machine.rates is None:
            raise MachineError(
                f"machine {self.machine.name} declares no rates, so nothing can be predicted for"
                " it: measure them (`hmc probe`) or name a machine with --machine"
            )
        self._cpu = self.machine.rates
        self._kv_width = sum(plan.kv.widths)
        self._format = {weight.name: weight.format for weight in plan.weights}
        self._expert_bytes: dict[str, int] = {}
        for experts in plan.experts:
            key = f"layer:{experts.layer}"
            self._format[key] = experts.format
            size = experts.bytes + experts.scale_bytes
            self._expert_bytes[key] = self._expert_bytes.get(key, 0) + size

    def step(self, phase: Phase, step: Step, call: Call) -> Cost:
        """The cost of a step in a call of its phase.

        A step's time is the largest of its transfers and computations, since a kernel overlaps
        them, plus what each launch takes; in a phase of two lanes, times the machine's slow-down
        of that side while the other one works.
        """
        if not call.logits and self._is_head(step):
            return Cost(0.0, "skipped")
        lanes = 1 if "whole" in step.attrs else phase.lanes
        share = int(step.attrs.get("ranks", 1)) * lanes
        if share > 1:
            sequences = -(-call.sequences // lanes)
            tokens = -(-call.tokens // share)
            call = Call(tokens, call.context, sequences, call.profile, call.logits)
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
        return Cost(cost.seconds * factor, cost.bound, cost.bytes, cost.flops, cost.launches)

    def _gpu(self, resource: str) -> GpuRates:
        number = int(resource[3:])  # gpu0, h2d0, d2h0
        if number >= len(self.machine.gpus):
            raise MachineError(f"machine {self.machine.name} has no {resource}")
        rates = self.machine.gpus[number].rates
        if rates is None:
            raise MachineError(f"machine {self.machine.name}: gpu{number} declares no rates")
        return rates

    def _work(self, step: Step, phase: Phase, call: Call) -> tuple[float, float, float, str, float]:
        """(weight bytes, weight FLOPs, activation bytes, format, routed rows) of a compute step.

        A matmul reads its weights once a call; routed experts the distinct ones that some token
        chose. FLOPs are those of one token times tokens. Activations are read and written once.
        """
        rows = self._rows(step, call)
        form = next((self._format[name] for name in step.weights.values()), "")
        if step.op == "experts":
            experts, top_k = int(step.attrs["experts"]), int(step.attrs["top_k"])
            here = int(step.attrs.get("count", experts))
            profile = (call.profile or {}).get(step.layer)
            if profile is not None:
                chosen = [profile[each] for each in _range(step, experts)]
                distinct = distinct_of_profile(chosen, call.tokens)
                routed = sum(chosen) * call.tokens
            else:
                distinct = distinct_experts(experts, top_k, call.tokens, here)
                routed = call.tokens * top_k * here / experts
            size = self._expert_bytes[next(iter(step.weights.values()))]
            flops = step.flops / top_k * routed
            # gather in, gate * up out and in, down out, all of routed rows; then the sum
            hidden, inner = int(step.attrs["k"]), int(step.attrs["n"])
            moved = routed * (4 * hidden + 4 * inner + 8 * hidden)
            return distinct * size, flops, moved, form, distinct
        sizes = self._widths(phase)
        moved = rows * sum(
            operand.width * sizes[operand.buffer]
            for operand in (*step.inputs.values(), *step.outputs.values())
        )
        weight = step.weight_bytes * (rows if step.op == "embed" else 1)
        return float(weight), float(step.flops) * rows, float(moved), form, 0.0

    def _rows(self, step: Step, call: Call) -> float:
        """Rows a step works on: those whose logits are wanted after the last gather, else all."""
        return float(call.sequences if self._is_head(step) else call.tokens)

    def _is_head(self, step: Step) -> bool:
        return step.layer < 0 and step.op in ("norm", "linear", "gather_rows", "copy")

    def _widths(self, phase: Phase) -> dict[str, int]:
        cached = getattr(self, "_cache", None)
        if cached is None or cached[0] is not phase:
            cached = (phase, {b.name: DTYPE_BYTES[b.dtype] for b in phase.buffers})
            self._cache = cached
        return cached[1]

    def _attention(
        self, step: Step, call: Call, latent: Callable[..., float] = mla_flops
    ) -> tuple[float, float]:
        """(cache bytes, FLOPs) of an attention step; a step of R ranks has 1/R of the pairs, since
        zig-zag pieces are balanced, but reads the cache of all tokens. `latent` counts the FLOPs of
        latent attention in the form that runs."""
        ranks = int(step.attrs.get("ranks", 1))
        every = call.tokens * ranks
        pairs = attended(every, call.context, call.sequences) / ranks
        keys = call.sequences * call.context + every
        if step.op == "mla":
            flops = latent(step.attrs, pairs, call.tokens, keys)
        else:
            flops = gqa_flops(
                int(step.attrs["heads"]),
                int(step.attrs["head_dim"]),
                int(step.attrs["v_dim"]),
                pairs,
            )
        return kv_bytes(self._kv_width, call.context, every, call.sequences), flops

    def _on_cpu(self, step: Step, phase: Phase, call: Call) -> Cost:
        weight, flops, moved, form, distinct = self._work(step, phase, call)
        rates = self._cpu
        read = sum(rate.value for rate in rates.read)
        # Tiled kernels stream weights and are bound by their products; those of decode read at
        # the rate of their format.
        prefill = phase.name.startswith("prefill")
        times = {"activations": moved / read, "compute": flops / rates.dot.value}
        if weight:
            dense = form in ("", "f32", "fp16")
            streamed = prefill or dense or step.op == "embed"
            rate = expert_rate if step.op == "experts" else gemv_rate
            times["weights"] = weight / (read if streamed else rate(rates, form, call.tokens))
        after = 0.0
        if step.op in ("attention", "mla"):
            latent = mla_expanded_flops if prefill else mla_flops
            cache, attention = self._attention(step, call, latent)
            # What one query of each head reads of the cache leaves no time for more than its
            # products, which run at the matmuls' rate, and so do those of the latent kernel of
            # prefill, which lifts keys and values by the matmuls' tiles. Many plain queries enter
            # in two terms and take exponentials.
            is_plain = prefill and step.op == "attention"
            speed = rates.attend.value if is_plain else rates.dot.value
            if weight:  # absorbing and lifting overlap with nothing else
                after = max(times.values())
                times = {"weights": after}
            times["cache"] = cache / read
            times["attention"] = attention / speed
            after = min(after, max(times["cache"], times["attention"]))
            flops += attention
            moved += cache
        bound = max(times, key=lambda name: times[name])
        launches = max(1, len(step.kernels))
        seconds = times[bound] + after + launches * rates.record.value
        seconds += distinct * _rate(rates.expert, 0.0)
        if step.waits:
            seconds += _rate(rates.handoff, 0.0)
        return Cost(seconds, bound, {"host": weight + moved}, {form or "f32": flops}, launches)

    def _on_gpu(self, step: Step, phase: Phase, call: Call, rates: GpuRates) -> Cost:
        weight, flops, moved, form, _ = self._work(step, phase, call)
        peak = rates.fp8.value if form == "fp8" else rates.bf16.value
        times = {"weights": weight / rates.memory.value, "compute": flops / peak}
        seconds = 0.0
        if step.op == "experts":
            seconds = moved / rates.memory.value  # gather and scatter are kernels of their own
        else:
            times["activations"] = moved / rates.memory.value
        if step.op in ("attention", "mla"):
            cache, attention = self._attention(step, call)
            flops += attention
            moved += cache
            scores = max(cache / rates.memory.value, attention / rates.attention.value)
            times = {"weights": max(times.values()), "attention": scores}
            seconds += min(times.values())
        bound = max(times, key=lambda name: times[name])
        launches = GPU_LAUNCHES.get(step.op, 1)
        seconds += times[bound] + launches * rates.launch.value
        return Cost(seconds, bound, {"gpu": weight + moved}, {form or "f32": flops}, launches)

    def _transfer(self, step: Step, phase: Phase, call: Call, kind: str) -> Cost:
        """Pinned copies: bytes at the rate of the way (of both ways at once where two lanes keep
        both busy) and the latency of one copy."""
        rates = self._gpu(step.resource)
        alone = rates.h2d if kind == "h2d" else rates.d2h
        both = rates.h2d_both if kind == "h2d" else rates.d2h_both
        speed = both if both is not None and phase.lanes > 1 else alone
        if step.op == "load":
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
        experts, top_k = int(step.attrs["experts"]), int(step.attrs["top_k"])
        here = int(step.attrs["count"])
        profile = (call.profile or {}).get(step.layer)
        if profile is None:
            return distinct_experts(experts, top_k, call.tokens, here) / here
        chances = [profile[each] for each in _range(step, experts)]
        return distinct_of_profile(chances, call.tokens) / here

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


def _range(step: Step, experts: int) -> list[int]:
    text = str(step.attrs.get("range", f"0-{experts - 1}"))
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found
