"""The machine a plan is made for, as data: cores, NUMA nodes, ISA flags, memory, GPUs, and rates.

Only lasting facts are kept (totals, not what is free now), so that compiling twice gives the same
plan. Filled by `hmc.machine.detect`, from a JSON file, or from a named machine in hmc/machines/.

Rates are optional: a machine without them can be planned for on the CPU, but nothing is predicted
for it. Every rate says where its value comes from. The file that a probe writes is this model as
JSON:

    {"name": .., "cpu": .., "flags": [..], "cores": N,
     "nodes": [{"id", "cpus", "memory_bytes", "cores", "memory"}],
     "llc_bytes": N, "memory_bytes": N,
     "rates": {"read": [RATE, one a node], "gemv": [{"format": "fp8", "tokens": 1, "rate": RATE}],
               "dot": RATE, "attend": RATE, "record": RATE, "expert": RATE, "handoff": RATE,
               "overlap": RATE, "remote": RATE, "link": RATE, "link_latency": RATE,
               "prefill": RATE},
     "gpus": [{"name", "memory_bytes",
               "rates": {"memory": RATE, "bf16": RATE, "fp8": RATE, "attention": RATE,
                         "launch": RATE, "sync": RATE, "hand_over": RATE, "h2d": RATE,
                         "d2h": RATE, "h2d_both": RATE, "d2h_both": RATE, "overlap": RATE,
                         "preempt": RATE}}]}

with RATE = {"value": float, "kind": .., "source": "..", "spread": 0.03, "peak": float}.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from hmc.errors import MachineError

RateKind = Literal["published", "data sheet", "measured", "derived", "fitted", "assumed"]


class Frozen(BaseModel):
    """Immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Rate(Frozen):
    """One number a machine was found to reach, in SI units (bytes/s, FLOP/s, seconds, ratios).

    `source` says where from ("measured 2026-03-01", a data sheet, a publication), `spread` is the
    relative spread of the measurement (0: unknown), `peak` the data sheet's number. A fitted value
    was chosen so that the simulator meets the figures named in `fitted_to`; whatever is compared
    with those is a calibration, no evidence, also where the simulator has changed since and misses
    them. The label goes when the value does.
    """

    value: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    kind: RateKind
    source: str
    spread: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    peak: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    fitted_to: tuple[str, ...] = ()

    def times(self, factor: float) -> Rate:
        """The same, `factor` times as much."""
        return self.model_copy(update={"value": self.value * factor})


class GemvRate(Frozen):
    """Weight bytes a second that the CPU's decode kernels read of one format at `tokens` tokens a
    call.
    """

    format: str
    tokens: Annotated[int, Field(ge=1)]
    rate: Rate

    def times(self, factor: float) -> GemvRate:
        """The same, `factor` times as much."""
        return self.model_copy(update={"rate": self.rate.times(factor)})


class CpuRates(Frozen):
    """What the CPU side reaches with all its cores.

    read          plain streaming reads, bytes/s, one entry a NUMA node (in the order of `nodes`)
    remote        reads of all nodes together where each reads another one's memory, bytes/s
    gemv          decode matmuls, weight bytes/s by format and tokens a call
    dot           prefill matmuls, FLOP/s
    attend        attention over the cache, FLOP/s
    record        seconds one record of a native program takes beyond its work (dispatch, barrier)
    experts       routed experts in decode, weight bytes/s by format, one token each (without a
                  format: as its gemv)
    expert        seconds one routed expert takes beyond its bytes (barrier between its halves)
    handoff       seconds until the CPU takes up work that another resource signalled
    overlap       factor on CPU times while a GPU computes another lane
    link          bytes/s of a GPU-to-GPU transfer staged through host memory, each way
    link_latency  seconds a staged exchange takes beyond its bytes
    prefill       seconds of a streamed prefill outside the layers (start, hand-over of the cache)
    """

    read: tuple[Rate, ...]
    gemv: tuple[GemvRate, ...]
    dot: Rate
    attend: Rate
    record: Rate
    experts: tuple[GemvRate, ...] = ()
    expert: Rate | None = None
    handoff: Rate | None = None
    overlap: Rate | None = None
    remote: Rate | None = None
    link: Rate | None = None
    link_latency: Rate | None = None
    prefill: Rate | None = None

    @property
    def read_all(self) -> float:
        """Bytes/s that all nodes read together."""
        return sum(rate.value for rate in self.read)


class GpuRates(Frozen):
    """What one GPU reaches.

    memory              device memory, bytes/s
    bf16, fp8           matmuls, FLOP/s (weights of other formats are expanded to bf16; no fp8: the
                        card has no such units)
    attention           attention, FLOP/s
    launch              seconds a kernel takes beyond its work
    hand_over           seconds the thread that hands work over takes for a kernel (for a graph: as
                        for one)
    sync                seconds of a copy between host and device beyond its bytes
    h2d, d2h            pinned copies, bytes/s, one way at a time
    h2d_both, d2h_both  the same while the other way is busy
    overlap             factor on GPU times while the CPU computes another lane
    preempt             seconds a kernel of an urgent stream waits for running thread blocks
    """

    memory: Rate
    bf16: Rate
    fp8: Rate | None = None
    attention: Rate
    launch: Rate
    sync: Rate
    hand_over: Rate | None = None
    h2d: Rate
    d2h: Rate
    h2d_both: Rate | None = None
    d2h_both: Rate | None = None
    overlap: Rate | None = None
    preempt: Rate | None = None

    def at_peak(self) -> GpuRates:
        """The data sheet's numbers, where they are known."""
        named = {name: getattr(self, name) for name in type(self).model_fields}
        peaks = {
            name: Rate(value=rate.peak, kind="data sheet", source=rate.source)
            for name, rate in named.items()
            if rate is not None and rate.peak is not None
        }
        return self.model_copy(update=peaks)


class NumaNode(Frozen):
    """One NUMA node with CPUs: these, of how many `cores` (0: each is one), its memory in bytes,
    and which node's `memory` its CPUs take pages from where it has none itself.
    """

    id: int
    cpus: tuple[int, ...]
    memory_bytes: int
    cores: int = 0
    memory: int | None = None

    @property
    def home(self) -> int:
        """The node whose memory its CPUs take pages from."""
        return self.id if self.memory is None else self.memory


class Gpu(Frozen):
    """One GPU: name, memory in bytes, and what it reaches."""

    name: str
    memory_bytes: int
    rates: GpuRates | None = None


class Machine(Frozen):
    """A machine's fingerprint. `memory_bytes` is what the process may use: RAM, or less under a
    cgroup limit.
    """

    name: str
    cpu: str
    flags: tuple[str, ...]
    cores: int
    nodes: tuple[NumaNode, ...]
    llc_bytes: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
    rates: CpuRates | None = None

    @property
    def known_rates(self) -> CpuRates:
        """The CPU's rates; `MachineError` where there are none."""
        if self.rates is None:
            raise MachineError(
                f"machine {self.name} declares no rates, so nothing can be predicted for it:"
                " measure them (`hmc probe`) or name a machine with --machine"
            )
        return self.rates

    def at_peak(self) -> Machine:
        """The machine with GPUs that reach what their data sheets say."""
        return self.model_copy(
            update={
                "gpus": tuple(
                    gpu.model_copy(update={"rates": gpu.rates and gpu.rates.at_peak()})
                    for gpu in self.gpus
                )
            }
        )

    @property
    def hybrid(self) -> bool:
        """Whether plans may use the GPUs: there are some, and the rates of both sides are known."""
        return bool(self.gpus) and bool(self.rates) and all(gpu.rates for gpu in self.gpus)

    def memory_of(self, device: str) -> int:
        """Bytes of a device of the ledger: "host" or "gpu<n>"; `KeyError` for another."""
        if device == "host":
            return self.memory_bytes
        for number, gpu in enumerate(self.gpus):
            if device == f"gpu{number}":
                return gpu.memory_bytes
        raise KeyError(f"machine {self.name} has no device {device}")
