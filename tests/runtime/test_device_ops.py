"""Ops on device buffers against float64, and which rows of a call a share is."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pytest
import torch
from device_ops_fake import Buffers, call_of, random, step_of, stored
from hypothesis import given
from hypothesis import strategies as some
from kernel_meanings import NO_OPTIONS, Options, attention_prefill, pointwise
from kernel_meanings import route as route_reference
from layouts import keys_and_values, layout

from hmc.blocks.attention import Rotary
from hmc.blocks.dense import RMSNorm
from hmc.blocks.reference import REFERENCES
from hmc.codegen.expr import SWIGLU
from hmc.codegen.rowwise import Rowwise
from hmc.errors import ExecutionError, MachineError, UnsupportedError
from hmc.ops import OPS
from hmc.ops.pointwise import attributes
from hmc.ops.routing import Routing
from hmc.runtime.device_ops import DEVICE_OPS, default, matmul, moe, scratch
from hmc.runtime.device_ops.exchange import gathered
from hmc.runtime.device_ops.gpu import table
from hmc.runtime.device_ops.matmul import Expert, Matrix
from hmc.runtime.device_ops.shares import Share, of_share
from hmc.runtime.memory.kv import KVCache

T = 23


# -- shares ----------------------------------------------------------------------------------------


@given(
    tokens=some.integers(2, 300), of=some.integers(1, 5), kind=some.sampled_from(("rank", "lane"))
)
def test_shares_part_the_call(tokens: int, of: int, kind: Any) -> None:
    whole = torch.arange(tokens)[:, None]
    shares = [Share(kind, index, of) for index in range(of)]
    parts = [of_share(whole, share, tokens, slice(0, tokens)) for share in shares]
    assert sorted(torch.cat(parts)[:, 0].tolist()) == list(range(tokens))
    back = torch.full_like(whole, -1)
    for share, part in zip(shares, parts, strict=True):
        gathered(share, part, back, tokens, slice(0, len(part)))
    assert torch.equal(back, whole)


@given(tokens=some.integers(2, 60), of=some.integers(1, 3), rows=some.integers(1, 30))
def test_shares_part_the_call_in_blocks(tokens: int, of: int, rows: int) -> None:
    whole = torch.arange(tokens)[:, None]
    back = torch.full_like(whole, -1)
    for index in range(of):
        share = Share("rank", index, of)
        for first in range(0, tokens, rows):
            block = slice(first, first + rows)
            gathered(share, of_share(whole, share, tokens, block), back, tokens, block)
    assert torch.equal(back, whole)


def test_ranks_zig_zag() -> None:
    assert Share("rank", 0, 2).pieces(10) == ((0, 2), (7, 10))
    assert Share("rank", 1, 2).pieces(10) == ((2, 5), (5, 7))


@pytest.fixture
def kv() -> KVCache:
    return KVCache(layout(*keys_and_values(16, 16), block=4, tokens=256, sequences=4), 64)


def test_calls_that_cannot_be_shared_are_refused(kv: KVCache) -> None:
    with pytest.raises(ExecutionError, match="3 tokens cannot be shared by 2 GPUs"):
        call_of(kv, [(0, 3)], [2], ranks=2)
    with pytest.raises(ExecutionError, match="logits are wanted of token 4, which another GPU"):
        call_of(kv, [(0, 10)], [9, 4], ranks=2)
    with pytest.raises(ExecutionError, match="must follow each other in a call of their own"):
        call_of(kv, [(0, 2), (0, 2)], [0])


# -- matmul ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["bf16", "fp16", "f32", "fp8", "int4"])
@pytest.mark.parametrize(("rows", "columns"), [(128, 256), (200, 192), (7, 320)])
def test_products_keep_stored_weights_intact(
    form: str, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "BYTES", 4 * 12 * columns * 60)  # slices cut 128-row blocks
    w, x = stored(form, rows, columns), random(T, columns).to(torch.bfloat16)
    exact = w.rows(0, rows).double()
    expected = x.double() @ exact.T
    found = matmul.matmul(x, w).double()
    assert (found - expected).norm() / expected.norm() < 2e-6
    if form in ("fp8", "int4"):  # a single rounding of code times scale would not do
        once = x.double() @ exact.to(torch.bfloat16).double().T
        assert (once - expected).norm() / expected.norm() > 5e-4


def test_int4_rows_are_codes_less_eight_times_scale() -> None:
    w = stored("int4", 3, 64)
    nibble = int(w.data[1, 4]) >> 12 & 15  # column 35
    assert w.rows(1, 2)[0, 35] == (nibble - 8) * w.planes[1][1, 1].float()


def test_the_rows_know_which_ops_have_kernels_on_gpus() -> None:
    assert {op.name for op in OPS.values() if op.triton} == set(table.TRITON_OPS)


def test_gpus_take_the_kernels_or_say_what_they_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    device, found = torch.device("cuda", 0), {"spec": object(), "capability": (8, 6)}
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: found["spec"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")
    computes = table.computes.__wrapped__
    assert not computes(torch.device("cpu"))
    assert computes(device)
    found["capability"] = (7, 5)
    with pytest.raises(MachineError, match=r"an old card has compute capability 7\.5"):
        computes(device)
    found["spec"] = None
    with pytest.raises(MachineError, match=r"Triton, which is not installed: pip install"):
        computes(device)


# -- routing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("scoring", "groups", "top_groups", "group_best"),
    [(0, 0, 0, 2), (1, 4, 2, 2), (1, 0, 0, 2), (2, 0, 0, 2), (0, 8, 3, 1), (3, 0, 0, 2),
     (4, 0, 0, 2), (5, 0, 0, 2)],
)  # fmt: skip
def test_routes_as_the_kernel_does(
    scoring: int, groups: int, top_groups: int, group_best: int, bias: bool
) -> None:
    logits = random(T, 32)
    logits[3] = 0.0  # ties everywhere
    logits[4, 5:9] = logits[4].max() + 1
    extra = random(32, seed=2) * 0.1 if bias else None
    about = Routing(scoring, True, groups, top_groups, group_best, eps=1e-6, jitter=0.1)
    ids, weights = moe.routed(logits, extra, 6, about)
    expected, shares = route_reference(
        logits.numpy(), None if extra is None else extra.numpy(), top_k=6, **asdict(about)
    )
    assert np.array_equal(ids.numpy(), expected)
    assert np.allclose(weights.numpy(), shares, atol=1e-6)


def test_infinite_and_undefined_logits_give_valid_ids() -> None:
    logits = torch.full((2, 8), float("nan"))
    logits[1, 6] = float("-inf")
    ids, _ = moe.routed(logits, None, 3, Routing(2, False, 4, 2))
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_slots_are_sorted_by_expert_and_negative_ids_left_out() -> None:
    ids = torch.tensor([[2, 0], [-1, 2], [1, -1]], dtype=torch.int32)
    found = moe.by_expert(ids, 4)
    assert found.counted == [2, 3, 4, 6, 6]
    assert found.slots[2:].tolist() == [1, 4, 0, 3]


# -- steps over buffers ----------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize("gamma", [False, True])
def test_rotary_rotates_in_place(kv: KVCache, interleaved: int, gamma: bool) -> None:
    heads, width, start = 3, 24, 8
    inverse = tuple(10000.0 ** -(i / 8) for i in range(8))
    norm = RMSNorm(width, 1e-5, heads) if gamma else None
    if norm is not None:
        norm.gamma.data = 1 + 0.1 * random(width)
    block = Rotary(
        heads, width, inverse, start=start, interleaved=bool(interleaved), factor=1.5, norm=norm
    )
    x = random(T, heads * width)
    call = call_of(kv, [(9, T)], [0])
    expected = block(x, torch.arange(9, 9 + T))
    weights = {} if norm is None else {"gamma": norm.gamma.data}
    buffers = Buffers({"x": x}, weights, {"rope": inverse})
    numbers = {"heads": heads, "head_dim": width, "start": start, "dim": 16, "eps": 1e-5}
    step = step_of(
        "rotary", buffers, "x", rope="rope", factor=1.5, interleaved=interleaved, **numbers
    )
    DEVICE_OPS["rotary"](buffers, step)(call)  # type: ignore[arg-type]
    assert torch.allclose(x, expected.detach(), atol=1e-6)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    past: int,
    scale: float,
    options: Options = NO_OPTIONS,
) -> torch.Tensor:
    """Attention in float64 of q [T, h, d] at positions past.. over k, v [past + T, kv, .]."""
    pages = (part.double().numpy().swapaxes(0, 1)[None] for part in (k, v))
    table = np.zeros(1, np.int32)
    found = attention_prefill(q.double().numpy(), *pages, table, past, scale, options)
    return torch.from_numpy(found).flatten(1)


GROWTH = Options(growth=0.4, growth_every=3, growth_from=1)
SINKS = np.array([1.5, -2.0, 0.25, 4.0])
OPTIONS = {
    "none": NO_OPTIONS,
    "window": Options(window=5),
    "chunk": Options(chunk=6),
    "softcap": Options(softcap=0.7),
    "sinks": Options(sinks=SINKS),
    "growth": GROWTH,
    "all": Options(chunk=6, softcap=0.9, sinks=SINKS, growth=0.4, growth_every=3),
}


def asked(options: Options) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Attributes and weights of a step."""
    attrs = {f.name: getattr(options, f.name) for f in fields(options) if f.name != "sinks"}
    given = {name: value for name, value in attrs.items() if value}
    if options.growth:
        given["growth_from"] = options.growth_from
    sinks = {} if options.sinks is None else {"sinks": torch.from_numpy(options.sinks).bfloat16()}
    return given, sinks


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("past", [0, 13])
def test_attention_sees_the_past_and_this_call(
    kv: KVCache, past: int, name: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(scratch, "BYTES", 4000)  # a query or so at a time
    heads, kv_heads, dim = 4, 2, 8
    call = call_of(kv, [(past, T)], [0])
    k, v = (random(past + T, 16, seed=s).to(torch.bfloat16) for s in (1, 2))
    caches = [torch.full((256, 16), float("nan"), dtype=torch.bfloat16) for _ in range(2)]
    for cache, values in zip(caches, (k, v), strict=True):
        cache[call.past_slots] = values[:past]
    values = {"q": random(T, 32), "k": k[past:].float(), "v": v[past:].float()}
    more, sinks = asked(OPTIONS[name])
    values["y"] = torch.zeros(T, 32, dtype=torch.bfloat16)
    buffers = Buffers(values, sinks, caches=caches)
    numbers = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, **more}
    step = step_of("attention", buffers, "y", scale=0.3, **numbers)
    DEVICE_OPS["attention"](buffers, step)(call)  # type: ignore[arg-type]
    q = values["q"].view(T, heads, dim)
    cached = (part.view(-1, kv_heads, dim) for part in (k, v))
    expected = reference(q, *cached, past, 0.3, OPTIONS[name])
    assert (buffers.values["y"].double() - expected).norm() / expected.norm() < 4e-3
    assert torch.equal(caches[0][call.slots], k[past:])  # appended where the tables say


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_of_a_batch_reads_each_ones_past(
    kv: KVCache, name: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(scratch, "BYTES", 1)  # one sequence at a time
    pasts = [0, 17, 6]
    call = call_of(kv, [(past, 1) for past in pasts], [0])
    caches = [torch.zeros(256, 16, dtype=torch.bfloat16) for _ in range(2)]
    new = [random(3, 16, seed=s).to(torch.bfloat16) for s in (1, 2)]
    kept = []
    for row, past in enumerate(pasts):
        at = np.arange(past)
        slots = torch.from_numpy(kv.tables[call.tables[row], at // 4].astype(np.int64) * 4 + at % 4)
        mine = []
        for part in (0, 1):
            old = random(past, 16, seed=10 * row + part).to(torch.bfloat16)
            caches[part][slots] = old
            mine.append(torch.cat((old, new[part][row : row + 1])).view(-1, 2, 8))
        kept.append(mine)
    values = {"q": random(3, 32), "k": new[0].float(), "v": new[1].float()}
    more, sinks = asked(OPTIONS[name])
    buffers = Buffers({**values, "y": torch.zeros(3, 32)}, sinks, caches=caches)
    numbers = {"heads": 4, "kv_heads": 2, "head_dim": 8, **more}
    step = step_of("attention", buffers, "y", scale=0.3, **numbers)
    DEVICE_OPS["attention"](buffers, step)(call)  # type: ignore[arg-type]
    for row, (k, v) in enumerate(kept):
        q = values["q"][row].view(1, 4, 8)
        expected = reference(q, k, v, pasts[row], 0.3, OPTIONS[name])[0]
        assert torch.allclose(buffers.values["y"][row].double(), expected, atol=1e-5)


@pytest.mark.parametrize(("past", "tokens"), [(0, T), (40, 2), (5, T)])
@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("grows", [False, True])
def test_latent_attention_in_both_forms(
    kv: KVCache, past: int, tokens: int, small: bool, grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(scratch, "BYTES", 40_000)  # a head, and some queries
    heads, nope, rope, v_dim, rank = 3, 8, 4, 6, 16
    call = call_of(kv, [(past, tokens)], [0])
    rows = random(past + tokens, rank + rope, seed=1).to(torch.bfloat16)
    cache = torch.full((256, rank + rope), float("nan"), dtype=torch.bfloat16)
    cache[call.past_slots] = rows[:past]
    w = stored("bf16", heads * (nope + v_dim), rank)
    new = rows[past:]
    values = {"q": random(tokens, heads * (nope + rope)), "latent": new[:, :rank].clone()}
    values |= {"k_rope": new[:, rank:].float(), "y": torch.zeros(tokens, heads * v_dim)}
    buffers = Buffers(values, {"kv_b": w}, caches=[cache])
    numbers = {"heads": heads, "nope": nope, "rope": rope, "v_dim": v_dim, "rank": rank}
    numbers |= asked(GROWTH)[0] if grows else {}
    step = step_of("mla", buffers, "y", scale=0.2, **numbers)
    DEVICE_OPS["mla"](buffers, step)(call)  # type: ignore[arg-type]
    parts = (rows[:, :rank].double() @ w.data.double().T).view(-1, heads, nope + v_dim)
    shared = rows[:, None, rank:].double().expand(-1, heads, -1)
    keys = torch.cat((parts[..., :nope], shared), -1)
    q = values["q"].view(tokens, heads, -1)
    expected = reference(q, keys, parts[..., nope:], past, 0.2, GROWTH if grows else NO_OPTIONS)
    assert torch.allclose(values["y"].double(), expected, atol=1e-4)
    assert torch.equal(cache[call.slots], new)


def test_an_op_without_a_function_is_computed_by_its_reference(kv: KVCache) -> None:
    """In f32, whatever inputs, vectors and results are stored in."""
    text = "silu(x0) * b0 * v0 + sum(x1)"
    form = Rowwise.given(text, {"width": 12, "groups": 3, "x0": 12, "b0": 3, "v0": 4, "x1": 12})
    rows = {"x0": random(T, 12), "x1": random(T, 12, seed=1), "b0": random(T, 3).bfloat16()}
    vector = random(4, seed=2).bfloat16()
    values = {**rows, "y": torch.zeros(T, 12, dtype=torch.bfloat16)}
    buffers = Buffers(values, {"v0": vector})
    step = step_of("pointwise", buffers, "y", **attributes(form, "bf16"))
    step = step.model_copy(update={"weights": {"v0": "v"}})
    table.device_op(step, torch.device("cpu"))(buffers, step)(call_of(kv, [(0, T)], [0]))  # type: ignore[arg-type]
    exact = {name: each.double().numpy() for name, each in {**rows, "v0": vector}.items()}
    expected = pointwise(form, exact)
    assert np.abs(values["y"].double().numpy() - expected).max() <= 2.0**-8 * np.abs(expected).max()


@pytest.mark.parametrize("lengths", [[(5, T)], [(3, 1), (9, 1), (0, 1)]])
def test_states_go_from_block_to_block(
    lengths: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    attrs = {"width": 6, "taps": 4, "act": "silu(x)", "state": "conv"}
    states = layout(*OPS["conv"].states(attrs), block=4, tokens=256, sequences=4)
    call, weight = call_of(KVCache(states, 64), lengths, [0]), random(6, 1, 4).bfloat16()
    rows, kept = sum(new for _, new in lengths), random(4, 18, seed=3)
    values = {"x": random(rows, 6), "y": torch.zeros(rows, 6)}
    buffers = Buffers(values, {"weight": weight}, caches=[kept.clone()])
    step = step_of("conv", buffers, "y", **attrs).model_copy(update={"weights": {"weight": "w"}})
    monkeypatch.setattr(scratch, "BYTES", 700)  # a few rows, or one sequence
    table.device_op(step, torch.device("cpu"))(buffers, step)(call)  # type: ignore[arg-type]
    sequences = values["x"].reshape(len(lengths), -1, 6)
    before = {"conv": kept[: len(lengths)]}
    made, after = REFERENCES["conv"](attrs, {"x": sequences}, {"weight": weight}, before)
    assert torch.allclose(values["y"], made["y"].flatten(0, 1), atol=1e-6)
    assert torch.equal(buffers.caches[0], torch.cat((after["conv"], kept[len(lengths) :])))


def test_an_op_without_a_reference_is_refused() -> None:
    buffers = Buffers({"y": torch.zeros(T, 4)})
    with pytest.raises(UnsupportedError, match="no reference computes it"):
        default.by_reference(buffers, step_of("norm", buffers, "y"))  # type: ignore[arg-type]


def test_experts_add_to_what_others_left(kv: KVCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "BYTES", 3 * 400)  # three rows or so
    call = call_of(kv, [(0, T)], [0])
    weights = {
        e: tuple(
            Matrix((random(*shape, seed=9 * e + i).to(torch.bfloat16) / 8,), "bf16", shape)
            for i, shape in enumerate(((12, 16), (12, 16), (16, 12)))
        )
        for e in range(8)
    }
    x, routing = random(T, 16).to(torch.bfloat16), random(T, 2, seed=7).abs()
    ids = torch.stack([torch.randperm(8)[:2] for _ in range(T)]).to(torch.int32)
    values = {"x": x, "ids": ids, "routing": routing, "y": torch.full((T, 16), 99.0)}
    for adding, mine in ((False, (0, 3, 5)), (True, (1, 2, 4, 6, 7))):
        buffers = Buffers(
            values, {"experts": {e: Expert(*weights[e]) for e in mine}}, adding=adding
        )
        step = step_of("experts", buffers, "y", experts=8, top_k=2, act=SWIGLU)
        step = step.model_copy(
            update={"inputs": {k: v for k, v in step.inputs.items() if k != "y"}}
        )
        DEVICE_OPS["experts"](buffers, step)(call)  # type: ignore[arg-type]
    expected = torch.zeros(T, 16, dtype=torch.float64)
    for token in range(T):
        for slot in range(2):
            gate, up, down = (m.data.double() for m in weights[int(ids[token, slot])])
            row = x[token].double()
            act = (torch.nn.functional.silu(gate @ row) * (up @ row)).to(torch.bfloat16).double()
            expected[token] += routing[token, slot] * (down @ act)
    assert (values["y"] - expected).norm() / expected.norm() < 2e-3
