"""The plan: the one thing that crosses from compiler to runtime, as frozen pydantic models.

A plan names every weight (shard, offset, format), every kernel (as a spec), every step of every
phase with the buffers it reads and writes, where each expert lives, what memory is needed, and why
each decision was taken. It holds no code and no weights. File format and canonical form live in
`hmc.plan.file`; rules of meaning in `hmc.plan.verify`. Ops of steps are the rows of hmc/ops, which
docs/ops.md lists.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hmc import env
from hmc.checkpoint import ShardInfo
from hmc.codegen.spec import KernelSpec
from hmc.machine.model import Machine
from hmc.plan.base import Count, DType, Frozen
from hmc.plan.options import Options
from hmc.plan.states import KVLayout
from hmc.ranges import expert_ranges

SCHEMA_VERSION = 3
ExpertRole = Literal["gate", "up", "down", "gate_bias", "up_bias", "down_bias"]
"""What each expert has of its own: a gate or none, biases of all matrices or of none."""
EXTERNAL = -1
"""Offset of buffers that the engine owns: ids, positions, rows and logits."""


class ModelInfo(Frozen):
    """The shape of a model in a few numbers.

    `experts` and `top_k` are those of its routed layers (0 without any), `context` the tokens its
    positions are made for, or fewer, and then `context_reason` says why. `parameters` counts stored
    weights once, tied ones too; `active_parameters` those one token is multiplied with: `top_k`
    experts a layer, and one row of the embedding table.
    """

    family: str
    architecture: str
    hidden: Count
    layers: Count
    vocab: Count
    experts: Count
    top_k: Count
    context: Count
    context_reason: str = ""
    parameters: Count
    active_parameters: Count
    eos_token_ids: tuple[int, ...]


class CheckpointInfo(Frozen):
    """The checkpoint the plan was made from; `path` is a hint, the hashes decide. No shards: made
    from a config alone. `lossy` says what `hmc quantize` lost, where it made the checkpoint; `hub`
    is the hub id that it was asked for by, with the commit.
    """

    path: str
    config_sha256: str
    shards: tuple[ShardInfo, ...]
    lossy: str = ""
    hub: str = ""

    @property
    def dummy(self) -> bool:
        """Whether the plan was made without weights, to be run with random ones."""
        return not self.shards


class StoredPart(Frozen):
    """A tensor with some rows of a matrix [N, K], `rows` of every head: [heads, rows, K], or,
    `transposed`, [heads, K, rows].
    """

    dtype: str
    shard: int
    offset: Count
    bytes: Count
    rows: Annotated[int, Field(ge=1)]
    transposed: bool = False


class StoredPick(Frozen):
    """Of a plane that is stored as `rows` rows of elements those from `first` on, a `run` of
    them every `step`; `transposed`: of one stored as columns of them. They are put beside each
    other when weights are opened; the plane's place is that of all rows, its bytes are its own.
    """

    rows: Annotated[int, Field(ge=1)]
    first: Count
    step: Annotated[int, Field(ge=1)]
    transposed: bool = False
    run: Annotated[int, Field(ge=1)] = 1


class StoredPlane(Frozen):
    """One plane of a weight, as its format's row names it (hmc/formats): a tensor of the
    checkpoint. `shard` indexes the checkpoint's shards (-1: a dummy), `offset` counts from the
    beginning of the file, in bytes. One with `parts` is put together from them when weights are
    opened, those of a head one after the other, and is so large in memory alone.
    """

    name: str
    dtype: str
    shard: int
    offset: Count
    bytes: Count
    parts: tuple[StoredPart, ...] = ()
    pick: StoredPick | None = None


class Weight(Frozen):
    """One weight: its planes in the order of its format's row, the codes first. `group` is the
    number of columns that share a scale, where the format leaves that open, else 0.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    group: Count = 0
    planes: tuple[StoredPlane, ...]

    @property
    def bytes(self) -> int:
        """Stored bytes of all planes."""
        return sum(plane.bytes for plane in self.planes)


class ExpertPlane(Frozen):
    """One plane of all experts: `shards` are run-length pairs (count, shard), `offsets` the first
    offset followed by differences, `bytes` those of one expert.
    """

    name: str
    dtype: str
    bytes: Count
    shards: tuple[tuple[int, int], ...]
    offsets: tuple[int, ...]
    pick: StoredPick | None = None


class ExpertWeights(Frozen):
    """One projection ("gate", "up", "down"), or its bias, of all routed experts of a layer, in
    columns so that the file stays small. Expert e is weight `pattern.format(e=e)`, stored as
    `Weight` says.
    """

    layer: Count
    role: ExpertRole
    pattern: str
    format: str
    shape: tuple[int, ...]
    count: Count
    group: Count = 0
    planes: tuple[ExpertPlane, ...]

    @property
    def bytes(self) -> int:
        """Stored bytes of all planes of one expert."""
        return sum(plane.bytes for plane in self.planes)


class LayerPlacement(Frozen):
    """Where the experts of one layer live: expert ranges by tier ("host", "gpu0", "streamed"), as
    "0-31,77".
    """

    layer: Count
    tiers: dict[str, str]

    @property
    def homes(self) -> dict[int, str]:
        """The tier of every expert."""
        return {e: tier for tier, text in self.tiers.items() for e in expert_ranges(text)}


class Buffer(Frozen):
    """An activation buffer: `width` elements a token; `offset` bytes a token into the phase's
    activation arena on `device`.

    Buffers whose lifetimes overlap never share bytes. External inputs and outputs have offset -1.
    """

    name: str
    dtype: DType
    width: Count
    offset: int
    device: str = "host"


class Slot(Frozen):
    """A region of device memory that weights pass through: filled by a load, used, filled again.

    `offset` bytes from where the phase's memory on the device begins. Slots that share bytes, and
    one that reaches into the activations (`Phase.arena_at`), hold what was put there last.
    """

    name: str
    device: str
    bytes: Count
    offset: Count = 0


class Operand(Frozen):
    """Columns [column, column + width) of every row of a buffer."""

    buffer: str
    column: Count = 0
    width: Count


class Step(Frozen):
    """One step: what it computes, on which resource, after which events, by which kernels.

    `weights` maps a role to a weight's name (for `experts`: "layer:<n>", the layer's
    ExpertWeights). `kernels` are keys of `Plan.kernels` in launch order, or what a device
    computes the step by: hmc's kernel "triton:<op>-<sizes>", or "torch:<function>". A step starts
    when every event in `waits` has been signalled.
    `weight_bytes` and `flops` are per call of one token (experts: its top_k; a load: what it
    moves). `section` is the half of its layer, or the head behind all layers.
    `fills` names the slots a load writes, `uses` those a step reads: the signal of a load
    is the ON event of its slots, that of the last use their OFF event.
    """

    id: Count
    op: str
    layer: int
    section: Literal["", "attention", "mlp", "head"] = ""
    resource: str
    inputs: dict[str, Operand]
    outputs: dict[str, Operand]
    weights: dict[str, str] = Field(default_factory=dict)
    attrs: dict[str, int | float | str] = Field(default_factory=dict)
    kernels: tuple[str, ...] = ()
    waits: tuple[int, ...] = ()
    signal: int = -1
    lane: Count = 0
    weight_bytes: Count = 0
    flops: Count = 0
    fills: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()


class Phase(Frozen):
    """One way to run the model: `decode` (1..16 tokens a call) or `prefill.host` (chunks up to
    `max_tokens`); with GPUs also `prefill.stream` (a whole prompt a layer, weights streamed;
    of shorter prompts also by phases `prefill.stream.<n>`, with a longer ring, and
    `prefill.stream.chosen`, with chosen experts alone),
    `decode.dual` (`lanes` halves of a batch that swap GPU and CPU) and, with several GPUs,
    `prefill.beside` (a prompt streamed through the last GPU while the first one decodes).

    `activation_bytes` a token on the host, `device_bytes` on other devices, whose arenas begin
    `arena_at` bytes after the phase's memory there (hmc/plan/memory.py). With `ranks` R > 1,
    gpu0 to gpu<R-1> share the tokens of a call; `ring` experts fit into the slots of one GPU.
    """

    name: str
    max_tokens: Count
    activation_bytes: Count
    buffers: tuple[Buffer, ...]
    steps: tuple[Step, ...]
    slots: tuple[Slot, ...] = ()
    device_bytes: dict[str, Count] = Field(default_factory=dict)
    arena_at: dict[str, Count] = Field(default_factory=dict)
    ranks: Annotated[int, Field(ge=1)] = 1
    lanes: Annotated[int, Field(ge=1)] = 1
    ring: Count = 0


class Switch(Frozen):
    """From how many tokens on a phase is the one to use: prompt tokens (prefill) or sequences
    (decode).
    """

    kind: Literal["prefill", "decode"]
    phase: str
    tokens: Count


class Goals(Frozen):
    """What was asked for at compile time: seconds to the first token of a prompt, tokens a second
    of each of `concurrency` sequences at a context; 0: no such goal.
    """

    ttft_seconds: Annotated[float, Field(ge=0)] = 0.0
    ttft_prompt: Count = 0
    tokens_per_second: Annotated[float, Field(ge=0)] = 0.0
    tokens_context: Count = 0
    concurrency: Count = 1


class LedgerItem(Frozen):
    """Bytes that one kind of thing takes on one device."""

    device: str
    kind: str
    bytes: Count
    detail: str


class Decision(Frozen):
    """What a pass decided about a subject, and why, with the numbers compared."""

    by: str
    subject: str
    choice: str
    reason: str


class Limits(Frozen):
    """What a run may ask for: tokens of context of one sequence, tokens of a prefill chunk, tokens
    of a decode call.
    """

    max_context: Count
    max_chunk: Count
    max_batch: Count


class Plan(Frozen):
    """An execution plan for one model on one machine; `options` are what it was asked to be."""

    schema_version: int = SCHEMA_VERSION
    hmc_version: str
    model: ModelInfo
    checkpoint: CheckpointInfo
    machine: Machine
    isa: str
    threads: Count
    limits: Limits
    weights: tuple[Weight, ...]
    experts: tuple[ExpertWeights, ...]
    constants: dict[str, tuple[float, ...]]
    placement: tuple[LayerPlacement, ...]
    kv: KVLayout
    kernels: dict[str, KernelSpec]
    phases: tuple[Phase, ...]
    ledger: tuple[LedgerItem, ...]
    decisions: tuple[Decision, ...]
    switches: tuple[Switch, ...] = ()
    goals: Goals = Goals()
    options: Options = Options()

    @property
    def workers(self) -> int:
        """Native workers that run it in this process: as many as it was asked to have, else
        `env.threads`, which may be fewer than where it was made."""
        return self.options.threads or env.threads()

    @property
    def ledger_totals(self) -> dict[str, int]:
        """Bytes a device, over all kinds."""
        devices = dict.fromkeys(item.device for item in self.ledger)
        return {each: sum(i.bytes for i in self.ledger if i.device == each) for each in devices}

    @property
    def too_large(self) -> list[str]:
        """Devices of the plan's machine that cannot hold what the ledger asks of them."""
        totals = self.ledger_totals.items()
        return [each for each, total in totals if total > self.machine.memory_of(each)]

    def phase(self, name: str) -> Phase:
        """The phase of a name; `KeyError` when the plan has none."""
        for phase in self.phases:
            if phase.name == name:
                return phase
        raise KeyError(f"the plan has no phase {name}")
