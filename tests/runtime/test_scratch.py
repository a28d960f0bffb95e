"""What ops make in passing keeps to `scratch.BYTES`, and results do not depend on it.

On the CPU: what copies between two GPUs make on the way is not seen here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from device_ops_fake import Buffers, call_of, random, step_of, stored
from layouts import keys_and_values, layout
from torch.profiler import ProfilerActivity, profile

from hmc.codegen.expr import SWIGLU
from hmc.codegen.rowwise import Rowwise
from hmc.ops import State
from hmc.ops.pointwise import attributes
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.exchange import cached
from hmc.runtime.device_ops.gpu.table import device_op
from hmc.runtime.device_ops.matmul import Expert, Matrix
from hmc.runtime.device_ops.shares import Call
from hmc.runtime.memory.kv import KVCache

SMALL = 1 << 20
T = 3001
K, N = 256, 512


def peak(work: Callable[[], object]) -> int:
    """Most bytes of tensors that were alive at once of those that `work` made."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = []
    todo = list(found.profiler.kineto_results.experimental_event_tree())
    while todo:
        event = todo.pop()
        todo += event.children
        if event.tag == torch._C._profiler._EventType.Allocation:
            events.append((event.start_time_ns, event.typed[1].alloc_size))
    live = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        most = max(most, live)
    return most


@dataclass
class Case:
    """A step, its memory, and what one head, row or weight of it takes at least, in bytes."""

    step: Step
    buffers: Buffers
    call: Call
    least: int = 0

    def work(self) -> None:
        device_op(self.step, torch.device("cpu"))(self.buffers, self.step)(self.call)  # type: ignore[arg-type]

    @property
    def memory(self) -> list[torch.Tensor]:
        """All that a step may write."""
        kept = [*self.buffers.values.values(), *self.buffers.caches]
        if self.buffers.kv is not None:
            kept += [cached(self.buffers.kv, 0, state) for state in ("k", "v")]
        return kept


def paged(tokens: int, *widths: int) -> KVCache:
    states = keys_and_values(*widths) if len(widths) == 2 else (State("latent", *widths),)
    room = -(-tokens // 16) * 16
    return KVCache(layout(*states, block=16, tokens=room, sequences=8), room)


def plain(op: str, outputs: str, values: dict[str, torch.Tensor], **options: Any) -> Case:
    """A step over T rows of one new sequence."""
    least, weights = options.pop("least", 0), options.pop("weights", {})
    wanted = options.pop("wanted", [0])
    buffers = Buffers(values, weights, options.pop("constants", {}))
    call = call_of(paged(T, 16, 16), [(0, T)], wanted)
    return Case(step_of(op, buffers, outputs, **options), buffers, call, least)


def bf16(*shape: int, seed: int = 0) -> torch.Tensor:
    return random(*shape, seed=seed).to(torch.bfloat16)


def embed() -> Case:
    ids = torch.arange(T, dtype=torch.int32)[:, None] % 100
    table = Matrix((bf16(100, N),), "bf16", (100, N))
    return plain("embed", "y", {"ids": ids, "y": torch.zeros(T, N)}, weights={"table": table})


def gather_rows() -> Case:
    values = {"x": random(T, N), "y": torch.zeros(T, N)}
    return plain("gather_rows", "y", values, wanted=list(range(0, T, 2)))


def norm(kind: torch.dtype = torch.float32) -> Case:
    values = {"x": random(T, N).to(kind), "y": torch.zeros(T, N, dtype=torch.bfloat16)}
    return plain("norm", "y", values, weights={"gamma": bf16(N // 4)}, groups=4, eps=1e-5)


def add() -> Case:
    values = {"h": random(T, N), "d0": bf16(T, N), "d1": bf16(T, N, seed=1)}
    return plain("add", "y", {**values, "y": torch.zeros(T, N)})


def add_norm() -> Case:
    values = {"h": random(T, N), "d0": random(T, N, seed=1), "d1": random(T, N, seed=2)}
    values |= {"h_out": torch.zeros(T, N), "y": torch.zeros(T, N, dtype=torch.bfloat16)}
    return plain("add_norm", "h_out y", values, weights={"gamma": random(N)}, eps=1e-5)


def linear(form: str) -> Case:
    weights = {"weight": stored(form, N, K), "bias": random(N)}
    values = {"x": bf16(T, K), "y": torch.zeros(T, N)}
    return plain("linear", "y", values, weights=weights, least=4 * K * N if form == "bf16" else 0)


def gate_up() -> Case:
    weights = {role: stored("fp8", N, K) for role in ("gate", "up")}
    values = {"x": bf16(T, K), "y": torch.zeros(T, N, dtype=torch.bfloat16)}
    return plain("gate_up", "y", values, weights=weights, act=SWIGLU)


def pointwise() -> Case:
    """A norm by head with a gate in bf16: the op's reference."""
    form = Rowwise.given(
        "x0 * rsqrt(mean(square(x0)) + 1e-06) * (v0 + 1.0) * sigmoid(b0)",
        {"width": N, "groups": 4, "x0": N, "b0": N, "v0": N // 4},
    )
    values = {"x0": random(T, N), "b0": bf16(T, N), "y": torch.zeros(T, N, dtype=torch.bfloat16)}
    weights = {"v0": random(N // 4, seed=2).to(torch.bfloat16)}
    case = plain("pointwise", "y", values, weights=weights, **attributes(form, "bf16"))
    return replace(case, step=case.step.model_copy(update={"weights": {"v0": "v"}}))


def rotary(kind: torch.dtype, gamma: bool, interleaved: int) -> Case:
    numbers = {"heads": 8, "head_dim": 64, "start": 16, "dim": 32, "interleaved": interleaved}
    return plain(
        "rotary",
        "x",
        {"x": random(T, N).to(kind)},
        weights={"gamma": random(64)} if gamma else {},
        constants={"rope": tuple(10000.0 ** -(i / 16) for i in range(16))},
        rope="rope",
        factor=1.5,
        eps=1e-5,
        **numbers,
    )


def route() -> Case:
    values = {"logits": random(T, 256), "ids": torch.zeros(T, 8, dtype=torch.int32)}
    numbers = {"top_k": 8, "scoring": 1, "groups": 8, "top_groups": 4, "normalise": 1}
    values["routing"] = torch.zeros(T, 8)
    return plain(
        "route", "ids routing", values, weights={"bias": random(256) / 10}, factor=2.5, **numbers
    )


def experts() -> Case:
    weights = {
        e: Expert(*(stored("fp8", *shape) for shape in ((N, K), (N, K), (K, N)))) for e in (0, 2, 3)
    }
    ids = torch.stack([torch.arange(T) % 2, 2 + torch.arange(T) % 5], 1).to(torch.int32)
    values = {"x": bf16(T, K), "ids": ids, "routing": random(T, 2), "y": torch.zeros(T, K)}
    # no sort before it: places of 2 T slots, as many again while they are sorted
    return plain(
        "experts",
        "y",
        values,
        weights={"experts": weights},
        experts=8,
        top_k=2,
        act=SWIGLU,
        least=40 * 2 * T,
    )


def attention(past: int, tokens: int, window: int, batch: int = 0, softcap: float = 0.0) -> Case:
    heads, kv_heads, dim = 8, 4, 32
    width = kv_heads * dim
    kv = paged((past + tokens + 16) * max(1, batch), width, width)
    lengths = [(past + n, 1) for n in range(batch)] or [(past, tokens)]
    call = call_of(kv, lengths, [0])
    rows = call.tokens
    caches = [bf16(kv.allocator.count * 16, width, seed=s) for s in (1, 2)]
    values = {"q": random(rows, heads * dim), "k": random(rows, width, seed=3)}
    values |= {"v": random(rows, width, seed=4), "y": torch.zeros(rows, heads * dim)}
    buffers = Buffers(values, caches=caches)
    numbers = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "window": window}
    step = step_of("attention", buffers, "y", scale=0.2, softcap=softcap, **numbers)
    # one head's keys and values
    return Case(step, buffers, call, 4 * 2 * dim * (past + tokens))


def mla(past: int, tokens: int, batch: int = 0) -> Case:
    heads, nope, rope, v_dim, rank = 8, 32, 16, 32, 64
    kv = paged((past + tokens + 16) * max(1, batch), rank + rope)
    lengths = [(past + n, 1) for n in range(batch)] or [(past, tokens)]
    call = call_of(kv, lengths, [0])
    rows = call.tokens
    values = {"q": random(rows, heads * (nope + rope)), "latent": random(rows, rank, seed=1)}
    values |= {"k_rope": random(rows, rope, seed=2), "y": torch.zeros(rows, heads * v_dim)}
    weights = {"kv_b": stored("fp8", heads * (nope + v_dim), rank)}
    buffers = Buffers(values, weights, caches=[bf16(kv.allocator.count * 16, rank + rope)])
    numbers = {"heads": heads, "nope": nope, "rope": rope, "v_dim": v_dim, "rank": rank}
    step = step_of("mla", buffers, "y", scale=0.2, **numbers)
    # the latents of the context, and one head's keys and values
    return Case(step, buffers, call, 4 * (past + tokens) * (rank + rope + 3 * (nope + rope)))


def linear_attention(channels: int, batch: int = 0) -> Case:
    heads, keys, values = 4, 32, 64
    state = State("recurrent", heads * keys * values, "sequence", "f32")
    kv = KVCache(layout(state, block=16, tokens=T + 16, sequences=8), T + 16)
    call = call_of(kv, [(n, 1) for n in range(batch)] or [(5, T)], [0])
    rows = call.tokens
    q, k = (torch.nn.functional.normalize(random(rows, 2, keys, seed=s), dim=2) for s in (1, 2))
    buffers = {"q": q.flatten(1), "k": k.flatten(1), "v": random(rows, heads * values, seed=3)}
    buffers["decay"] = random(rows, heads * (keys if channels else 1), seed=4).sigmoid()
    buffers |= {"beta": random(rows, heads).sigmoid(), "y": torch.zeros(rows, heads * values)}
    memory = Buffers(buffers, caches=[random(8, state.width, seed=5)])
    numbers = {"heads": heads, "key_heads": 2, "key_dim": keys, "value_dim": values}
    numbers |= {"channels": channels, "delta": 1, "tiled": 0}
    step = step_of("linear_attention", memory, "y", scale=0.2, **numbers)
    return Case(step, memory, call, 4 * 3 * state.width)  # three times a state


def kv_moved(op: str) -> Case:
    kv = paged(T, 256, 256)
    values = {"k": random(T, 256), "v": random(T, 256, seed=1)}
    caches = [torch.zeros(kv.allocator.count * 16, 256, dtype=torch.bfloat16) for _ in range(2)]
    for part, state in enumerate(("k", "v")):
        pages = cached(kv, 0, state)
        pages.copy_(bf16(*pages.shape, seed=part))
    buffers = Buffers(values, caches=caches, kv=kv, phase=SimpleNamespace(steps=[]))
    # slots, their blocks and places
    return Case(step_of(op, buffers, ""), buffers, call_of(kv, [(0, T)], [0]), 3 * 8 * T)


def between_ranks(op: str) -> Case:
    sizes = (T, T) if op == "exchange" else (T // 2 + 2, T // 2 + 2)
    values = {f"x{rank}": random(rows, N, seed=rank) for rank, rows in enumerate(sizes)}
    for rank in range(2):
        whole = torch.zeros(T // 2 + 2, N) if op == "exchange" else torch.zeros(T, N).bfloat16()
        values[f"y{rank}"] = whole
    buffers = Buffers(values, phase=SimpleNamespace(ranks=2, steps=[]))
    return Case(
        step_of(op, buffers, "y0 y1"),
        buffers,
        call_of(paged(T, 16, 16), [(0, T)], [T - 1], ranks=2),
    )


CASES: dict[str, Callable[[], Case]] = {
    "embed": embed,
    "gather_rows": gather_rows,
    "norm": norm,
    "norm of bf16": lambda: norm(torch.bfloat16),
    "add": add,
    "add_norm": add_norm,
    **{f"linear {form}": lambda form=form: linear(form) for form in ("bf16", "f32", "fp16")},
    **{f"linear {form}": lambda form=form: linear(form) for form in ("fp8", "int4")},
    "gate_up": gate_up,
    "pointwise": pointwise,
    "rotary": lambda: rotary(torch.float32, False, 0),
    "rotary of bf16, normed": lambda: rotary(torch.bfloat16, True, 1),
    "route": route,
    "experts": experts,
    "attention": lambda: attention(0, 1501, 0),
    "attention with a past": lambda: attention(300, 1201, 0),
    "attention in a window": lambda: attention(300, 1201, 200),
    "attention with a cap": lambda: attention(300, 1201, 0, softcap=2.0),
    "attention of a batch with a cap": lambda: attention(1500, 1, 0, batch=6, softcap=2.0),
    "attention of a batch": lambda: attention(1500, 1, 0, batch=6),
    "mla": lambda: mla(300, 1201),
    "mla absorbed": lambda: mla(2001, 20),
    "mla of a batch": lambda: mla(1500, 1, batch=6),
    "linear attention": lambda: linear_attention(0),
    "linear attention by channels": lambda: linear_attention(1),
    "linear attention of a batch": lambda: linear_attention(0, batch=6),
    "kv_out": lambda: kv_moved("kv_out"),
    "kv_in": lambda: kv_moved("kv_in"),
    "all_gather": lambda: between_ranks("all_gather"),
    "exchange": lambda: between_ranks("exchange"),
}


# Products of other shapes may take other kernels of the library, whose sums have another order.
ROUNDED = {"experts", "attention", "attention with a past", "attention in a window"}
ROUNDED |= {"linear attention", "linear attention by channels"}
ROUNDED |= {"mla", "mla absorbed", "attention with a cap", "attention of a batch with a cap"}


@pytest.mark.few(10)
@pytest.mark.parametrize("name", CASES)
def test_temporaries_keep_to_their_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = CASES[name](), CASES[name]()
    whole.work()
    monkeypatch.setattr(scratch, "BYTES", SMALL)
    assert peak(parts.work) <= 2 * SMALL + parts.least
    for expected, found in zip(whole.memory, parts.memory, strict=True):
        if name in ROUNDED:
            assert (found - expected).float().norm() <= 1e-6 * expected.float().norm()
        else:
            assert torch.equal(found, expected)


def test_blocks_are_as_long_as_they_may_be_and_equally() -> None:
    assert list(scratch.blocks(3, 3, 1)) == []
    assert list(scratch.blocks(0, 7, 0)) == [slice(0, 7)]
    assert list(scratch.blocks(1, 11, 10, 45)) == [slice(1, 5), slice(5, 9), slice(9, 11)]
    assert list(scratch.blocks(0, 5, 10, 40)) == [slice(0, 3), slice(3, 5)]
    assert [each.stop for each in scratch.blocks(0, 2, scratch.BYTES + 1)] == [1, 2]
