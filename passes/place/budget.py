"""How many tokens of context and of cache a plan has room for; with GPUs, how their memory is
divided before experts are placed: attention, shared experts and norms first, then the cache, then
what streamed prefill needs, then experts.

Contract
    * nothing is placed on GPUs of a machine that declares no rates, that cannot hold the dense part
      or whose kernels cannot read its formats; no experts are where they cannot read theirs; these
      are recorded as decisions
    * an explicit context length is kept. Else with GPUs it is what gpu0 holds, on the CPU alone the
      largest that leaves a tenth of the memory free; at most 32,768 and the model's own
    * where the CPU works alone, windows have rings where they take less (place/windows.py)
    * a host too small is no error here: plans are made for machines that are not at hand. The
      ledger shows it, and a run refuses
"""

from __future__ import annotations

from hmc.errors import CapacityError, UsageError
from hmc.ops.row import PAGED
from hmc.passes.place.windows import whole_windows, windowed
from hmc.passes.records import DEFAULT_CONTEXT, Budget, Capacity, Needs, Notes, Target
from hmc.plan import KVLayout, Limits
from hmc.plan.memory import PAGED_SCRATCH, SCRATCH, context_scratch
from hmc.plan.options import Options

_SMALLEST = 1_024
_GPU_RESERVE = 0.04
"""Share of a GPU's memory left to its driver, its libraries and fragmentation."""
_HOST_RESERVE = 0.1


def capacity(needs: Needs, target: Target, options: Options) -> Capacity:
    """The plan's limits, its cache, and its GPUs' budget.

    Raises `CapacityError` when an explicit context length, concurrency or --vram cannot be met by a
    GPU; it names what binds and what would lift it.
    """
    model, asked = target.info.context, options.max_context
    if asked and model and asked > model:
        raise UsageError(
            f"--max-context {asked}: the model's context is {model} tokens"
            f" ({target.info.context_reason or 'max_position_embeddings'})"
        )
    notes = Notes("budget")
    budget = divide(needs, target, options, notes)
    cache = needs.cache
    if budget is None:
        cache = windowed(cache, options, asked or _default(model), notes)
        tokens = _host_tokens(needs, cache, target, asked, notes)
    else:
        tokens = budget.tokens
        whole_windows(cache, notes)
        notes.decide(
            "context length",
            f"{tokens} tokens, {options.concurrency} sequence(s)",
            f"{_allowed(target)}; gpu0 holds {budget.dense / 1e9:.1f} GB"
            f" of dense weights and {budget.cache / 1e9:.1f} GB of cache in"
            f" {budget.usable[0] / 1e9:.1f} GB",
        )
    block = cache.block
    held = -(-tokens // block) * block * options.concurrency + _partial_blocks(needs, options)
    chunk = min(options.max_chunk, tokens)
    sizes = {"capacity_tokens": held, "room": min(cache.room, chunk)}
    return Capacity(
        Limits(max_context=tokens, max_chunk=chunk, max_batch=options.max_batch),
        cache.model_copy(update=sizes),
        budget,
        tuple(notes.made),
    )


def divide(needs: Needs, target: Target, options: Options, notes: Notes) -> Budget | None:
    """The budget of a hybrid plan, or None (with a decision) where the CPU works alone."""
    machine = target.machine
    if not machine.gpus:
        return None
    if not machine.hybrid:
        notes.decide(
            "GPUs",
            "unused",
            f"machine {machine.name} declares {len(machine.gpus)} GPU(s) without rates: what"
            " would be gained is unknown until they are measured (`hmc probe`)",
        )
        return None
    if needs.dense_unread:
        notes.decide("GPUs", "unused", needs.dense_unread)
        return None
    usable = tuple(
        int(min(gpu.memory_bytes, options.vram or gpu.memory_bytes) * (1 - _GPU_RESERVE))
        for gpu in machine.gpus
    )
    dense, per_token = needs.dense, needs.cache.bytes_per_token
    workspace = _workspace(needs, target.info.vocab, options)
    tokens = _gpu_tokens(needs, target, options, usable[0], workspace, notes)
    if tokens == 0:
        return None
    attention = context_scratch(needs.cache, tokens)
    workspace += attention
    cache = per_token * (tokens * options.concurrency + _partial_blocks(needs, options))
    cache += needs.cache.bytes_of_sequences
    beside = [usable[0] - cache - workspace, *(each - SCRATCH - attention for each in usable[1:])]
    room = [beside[0] - dense, *beside[1:]]
    ring = 0
    if needs.experts_unread:
        notes.decide("experts on GPUs", "none, nor on their way", needs.experts_unread)
        room = [0] * len(room)
    elif needs.experts and sum(room) < needs.experts:
        ranks = len(usable)
        window = 2 * _section(needs, target.info.layers)
        activations = needs.stream_token * tokens // ranks
        left = [each - activations - window for each in beside]
        asked = options.ring * (needs.layer // target.info.experts)
        ring = max(0, min(needs.layer // ranks, asked or needs.layer, *left))
        head = needs.kinds.get("embedding and output", 0) - needs.table
        slots = max(ring, head - window)  # the output layer lies over the others
        room = [max(0, min(one, other - slots)) for one, other in zip(room, left, strict=True)]
    return Budget(usable, dense, cache, workspace, ring, tuple(room), tokens, needs.stream_token)


def _partial_blocks(needs: Needs, options: Options) -> int:
    """Tokens of cache that many sequences at once may waste in blocks that are not full."""
    return needs.cache.block * (options.max_batch - 1)


def _default(model: int) -> int:
    """The most tokens of context that a plan has without being asked for more."""
    return min(DEFAULT_CONTEXT, model or DEFAULT_CONTEXT)


def _allowed(target: Target) -> str:
    reason = target.info.context_reason
    return f"the model allows {target.info.context}" + (f" ({reason})" if reason else "")


def _host_tokens(needs: Needs, cache: KVLayout, target: Target, asked: int, notes: Notes) -> int:
    """Context length on the CPU alone."""
    if asked:
        notes.decide("context length", f"{asked} tokens", "asked for")
        return asked
    model, weights = target.info.context, sum(needs.kinds.values()) + needs.experts
    free = int(target.machine.memory_bytes * (1 - _HOST_RESERVE)) - weights
    free -= cache.bytes_of_sequences
    fits = max(0, free) // max(1, cache.bytes_per_token)
    limit = _default(model)
    tokens = max(min(fits // 256 * 256, limit), min(_SMALLEST, limit))
    notes.decide(
        "context length",
        f"{tokens} tokens",
        f"{_allowed(target)}, memory beside {weights / 1e9:.1f} GB of weights holds"
        f" {fits}, the default is at most {DEFAULT_CONTEXT}; --max-context asks for more or"
        " less",
    )
    return tokens


def _gpu_tokens(
    needs: Needs, target: Target, options: Options, usable: int, workspace: int, notes: Notes
) -> int:
    """Context length that fits gpu0, or what was asked for; 0: the dense part is too large."""
    model, dense = target.info.context, needs.dense
    per_token = needs.cache.bytes_per_token
    attention = context_scratch(needs.cache, 1)
    free = usable - dense - workspace - per_token * _partial_blocks(needs, options)
    free -= needs.cache.bytes_of_sequences
    fits = max(0, free) // max(1, per_token * options.concurrency + attention)
    limit = _default(model)
    asked = options.max_context or (limit if options.concurrency > 1 else 0)
    have = f"{usable / 1e9:.1f} GB usable on gpu0"
    if asked and fits < asked:
        need = asked * per_token * options.concurrency
        whole = dense + workspace + attention * asked + need
        lifts = [f"a GPU with {whole / (1 - _GPU_RESERVE) / 1e9:.0f} GB"]
        if fits >= _SMALLEST:
            lifts.insert(0, f"--max-context {fits // 256 * 256}")
        if (
            options.concurrency > 1
            and (alone := (free - attention * asked) // (per_token * asked)) >= 1
        ):
            lifts.insert(0, f"--concurrency {alone}")
        if options.vram:
            lifts.insert(0, "a larger --vram")
        raise CapacityError(
            f"memory of gpu0 binds: {dense / 1e9:.1f} GB of attention, shared experts and norms and"
            f" {need / 1e9:.1f} GB of KV cache ({options.concurrency} x {asked} tokens x"
            f" {per_token} B) exceed {have}; what would lift it: {' or '.join(lifts)}"
        )
    if fits < min(_SMALLEST, limit):
        notes.decide(
            "GPUs",
            "unused",
            f"attention, shared experts and norms take {dense / 1e9:.1f} GB, activations, logits"
            f" and temporaries {workspace / 1e9:.1f} GB: what is left of {have} holds a cache of"
            f" {fits} tokens",
        )
        return 0
    return asked or min(fits // 256 * 256, limit)


def _workspace(needs: Needs, vocab: int, options: Options) -> int:
    """Bytes of gpu0 for temporaries, activations of a decode step and of a prefill chunk, and their
    logits."""
    rows = options.max_chunk + options.max_batch
    logits = rows + options.max_batch  # a streamed prompt has its own
    more = PAGED_SCRATCH if options.attention == PAGED else 0
    return SCRATCH + more + rows * needs.stream_token + 4 * vocab * logits


def _section(needs: Needs, layers: int) -> int:
    """Bytes of one layer's dense weights, of which two are on their way or in use; what is before
    and after the layers has no slot of its own."""
    inside = sum(size for kind, size in needs.kinds.items() if kind != "embedding and output")
    return inside // max(1, layers) * 2
