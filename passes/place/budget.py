"""How many tokens of context and of cache a plan has room for; with GPUs, how their memory is
divided before experts are placed: attention, shared experts and norms first, then the cache, then
what streamed prefill needs, then experts.

Contract
    * nothing is placed on GPUs of a machine that declares no rates, that cannot hold the dense part
      or whose kernels cannot read its formats; no experts are where they cannot read theirs; these
      are recorded as decisions
    * an explicit context length is kept. Else with GPUs it is what gpu0 holds, on the CPU alone the
      largest that leaves a tenth of the memory free; at most 32,768 and the model's own
    * the cache holds `concurrency` whole contexts at least. On the CPU alone it may take half of
      the memory that weights and a tenth leave free, where all experts are on GPUs half of what is
      left of gpu0; up to a whole context for every sequence that may decode. An explicit number of
      tokens is kept
    * where the CPU works alone, windows have rings where they take less (place/windows.py)
    * a host too small is no error here: plans are made for machines that are not at hand. The
      ledger shows it, and a run refuses
"""

from __future__ import annotations

from collections.abc import Sequence

from hmc.errors import CapacityError, UsageError
from hmc.machine.model import Machine
from hmc.ops.row import PAGED
from hmc.passes.place.needs import with_snapshots
from hmc.passes.place.windows import whole_windows, windowed
from hmc.passes.records import BLOCK, DEFAULT_CONTEXT, Budget, Capacity, Needs, Notes, Target
from hmc.plan import KVLayout, Limits
from hmc.plan.memory import PAGED_SCRATCH, SCRATCH, context_scratch
from hmc.plan.options import Options

_SMALLEST = 1_024
_GPU_RESERVE = 0.04
"""Share of a GPU's memory left to its driver, its libraries and fragmentation."""
_HOST_RESERVE = 0.1
_CACHE_SHARE = 0.5
"""Share of the memory that nothing else needs which the cache may take."""


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
        context = asked or _limit(model, options)
        pages = _host_cache(needs, cache, target, options, context) // cache.block
        cache = with_snapshots(cache, options, pages)
        cache = windowed(cache, options, context, pages, notes)
        tokens = _host_tokens(needs, cache, target, options, notes)
        held = _host_cache(needs, cache, target, options, tokens)
    else:
        tokens, held = budget.tokens, budget.held
        whole_windows(cache, notes)
        notes.decide(
            "context length",
            f"{tokens} tokens, {options.concurrency} sequence(s)",
            f"{_allowed(target)}; gpu0 holds {budget.dense / 1e9:.1f} GB"
            f" of dense weights and {budget.cache / 1e9:.1f} GB of cache in"
            f" {budget.usable[0] / 1e9:.1f} GB",
        )
    _note_cache(cache, options, tokens, held, notes)
    _note_states(cache, options, notes)
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
    held = _least(needs.cache, options, tokens)
    cache = per_token * held + needs.cache.bytes_of_sequences
    beside = [usable[0] - cache - workspace, *(each - SCRATCH - attention for each in usable[1:])]
    room = [beside[0] - dense, *beside[1:]]
    if (more := _more(needs, options, tokens, held, room)) > 0:
        held += more
        cache += per_token * more
        beside[0] -= per_token * more
        room[0] -= per_token * more
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
    return Budget(
        usable, dense, cache, workspace, ring, tuple(room), tokens, held, needs.stream_token
    )


def _least(cache: KVLayout, options: Options, tokens: int) -> int:
    """Tokens of the cache that was asked for: so many, or so many whole contexts, and what
    sequences may waste in blocks that are not full. `UsageError` where no context fits.
    """
    block, asked = cache.block, options.cache_tokens
    context = -(-tokens // block) * block
    if not asked:
        return context * options.concurrency + _partial(cache, options)
    least = max(context, block * options.max_batch)
    if asked < least:
        raise UsageError(
            f"--cache-tokens {asked}: a context of {tokens} tokens and {options.max_batch}"
            f" sequences need {least} at least; ask for more or a smaller --max-context"
        )
    return -(-asked // block) * block


def _most(cache: KVLayout, options: Options, tokens: int) -> int:
    """Tokens of a cache in which every sequence that may decode has a whole context."""
    return -(-tokens // cache.block) * cache.block * options.max_batch


def _partial(cache: KVLayout, options: Options) -> int:
    """Tokens of cache that many sequences at once may waste in blocks that are not full."""
    return cache.block * (options.max_batch - 1)


def _host_cache(
    needs: Needs, cache: KVLayout, target: Target, options: Options, tokens: int
) -> int:
    """Tokens of the cache on the CPU alone."""
    least = _least(cache, options, tokens)
    if options.cache_tokens:
        return least
    share = _CACHE_SHARE * (host_free(needs, target.machine) - cache.bytes_of_sequences)
    fits = int(max(0, share) // max(1, cache.bytes_per_token)) // cache.block * cache.block
    return max(least, min(fits, _most(cache, options, tokens)))


def _more(needs: Needs, options: Options, tokens: int, held: int, room: Sequence[int]) -> int:
    """Tokens of cache beside the least where GPUs have room for all experts, or can have none."""
    if options.cache_tokens:
        return 0
    spare = sum(room) - (0 if needs.experts_unread else needs.experts)
    cache = needs.cache
    share = int(_CACHE_SHARE * max(0, min(room[0], spare)))
    fits = share // max(1, cache.bytes_per_token) // cache.block * cache.block
    return min(fits, _most(cache, options, tokens) - held)


def _note_cache(cache: KVLayout, options: Options, tokens: int, held: int, notes: Notes) -> None:
    """Say what the cache holds, and why not less or more."""
    why = f"{_CACHE_SHARE:.0%} of the memory that nothing else needs at most"
    if options.cache_tokens:
        why = "asked for"
    elif held == _least(cache, options, tokens):
        why = f"{options.concurrency} full context(s), the least: weights take the rest"
    elif held == _most(cache, options, tokens):
        why = f"a full context for each of {options.max_batch} sequences; {why}"
    size = held * cache.bytes_per_token / 1e9
    notes.decide(
        "cache",
        f"{held} tokens, {size:.1f} GB",
        f"{why}; requests take blocks as they grow; --cache-tokens asks for more or less",
    )


def _note_states(cache: KVLayout, options: Options, notes: Notes) -> None:
    """Say what is kept of sequences whatever their length, and of prompts for others."""
    each, room = cache.bytes_per_snapshot, options.snapshot_bytes / 1e9
    if not cache.bytes_per_sequence:
        return
    kept = f"{cache.snapshots or 'no'} snapshots" + ": no prompt is reused" * (not cache.snapshots)
    notes.decide(
        "states of sequences",
        f"{cache.bytes_per_sequence / 1e6:.3g} MB each, {kept}",
        f"a snapshot, from which prompts that begin alike go on, takes {each / 1e6:.3g} MB of"
        f" {room:.3g} GB; --snapshot-memory asks for more or less",
    )


def _default(model: int) -> int:
    """The most tokens of context that a plan has without being asked for more."""
    return min(DEFAULT_CONTEXT, model or DEFAULT_CONTEXT)


def _limit(model: int, options: Options) -> int:
    """The same, where the cache's size was asked for."""
    return min(_default(model), options.cache_tokens // BLOCK * BLOCK or DEFAULT_CONTEXT)


def _allowed(target: Target) -> str:
    reason = target.info.context_reason
    return f"the model allows {target.info.context}" + (f" ({reason})" if reason else "")


def host_free(needs: Needs, machine: Machine) -> int:
    """Bytes of a machine's memory beside weights and the reserve; negative where it is small."""
    weights = sum(needs.kinds.values()) + needs.experts
    return int(machine.memory_bytes * (1 - _HOST_RESERVE)) - weights


def _host_tokens(
    needs: Needs, cache: KVLayout, target: Target, options: Options, notes: Notes
) -> int:
    """Context length on the CPU alone."""
    if asked := options.max_context:
        notes.decide("context length", f"{asked} tokens", "asked for")
        return asked
    model, weights = target.info.context, sum(needs.kinds.values()) + needs.experts
    free = host_free(needs, target.machine) - cache.bytes_of_sequences
    fits = max(0, free) // max(1, cache.bytes_per_token)
    limit = _limit(model, options)
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
    fixed = options.cache_tokens or _partial(needs.cache, options)
    each = 0 if options.cache_tokens else per_token * options.concurrency
    free = usable - dense - workspace - per_token * fixed - needs.cache.bytes_of_sequences
    fits = max(0, free) // max(1, each + attention)
    if options.cache_tokens:
        fits = min(fits, options.cache_tokens)
    limit = _default(model)
    asked = options.max_context or (limit if options.concurrency > 1 else 0)
    have = f"{usable / 1e9:.1f} GB usable on gpu0"
    if asked and fits < asked:
        need, states = asked * per_token * options.concurrency, needs.cache.bytes_of_sequences
        whole = dense + workspace + attention * asked + need + states
        lifts = [f"a GPU with {whole / (1 - _GPU_RESERVE) / 1e9:.0f} GB"]
        if fits >= _SMALLEST:
            lifts.insert(0, f"--max-context {fits // 256 * 256}")
        if (
            options.concurrency > 1
            and (alone := (free - attention * asked) // max(1, per_token * asked)) >= 1
        ):
            lifts.insert(0, f"--concurrency {alone}")
        if options.vram:
            lifts.insert(0, "a larger --vram")
        if needs.cache.snapshots:
            lifts.insert(0, "a smaller --snapshot-memory")
        beside = f" and {states / 1e9:.1f} GB of states of sequences" if states else ""
        raise CapacityError(
            f"memory of gpu0 binds: {dense / 1e9:.1f} GB of attention, shared experts and norms and"
            f" {need / 1e9:.1f} GB of KV cache ({options.concurrency} x {asked} tokens x"
            f" {per_token} B){beside} exceed {have}; what would lift it: {' or '.join(lifts)}"
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
