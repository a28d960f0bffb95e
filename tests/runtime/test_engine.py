"""The engine's promises beside parity (tests/e2e): ends, errors, Ctrl-C, chunking, homes, and that
nothing leaks.
"""

import numpy as np
import pytest

import hmc
from hmc.codegen import isa
from hmc.errors import (
    CapacityError,
    ContextLengthError,
    ExecutionError,
    MachineError,
    UsageError,
)
from hmc.runtime import executor

PROMPT = [5, 17, 230, 99, 4, 77]


@pytest.fixture(scope="module")
def engine(checkpoint):
    directory = checkpoint("qwen3_moe", "fp8", with_tokenizer=True)
    plan = hmc.compile(directory, max_context=128, cache_tokens=1088)
    with hmc.Engine(plan) as engine:
        yield engine


@pytest.fixture(autouse=True)
def nothing_leaks(request):
    yield
    if "engine" in request.fixturenames:
        assert request.getfixturevalue("engine").executor.kv.allocator.used == 0


def test_greedy_takes_the_best_of_the_logits(engine):
    ids = list(PROMPT)
    for _ in range(6):
        ids.append(int(engine.logits(ids)[-1].argmax()))
    result = engine.generate(PROMPT, max_new_tokens=6, temperature=0)
    assert list(result.token_ids) == ids[len(PROMPT) :]
    assert result.finish_reason == "length"
    assert result.text == engine.text.decode(result.token_ids)
    timings = result.timings
    assert (timings.prompt_tokens, timings.new_tokens) == (6, 6)
    assert 0 < timings.ttft_s < timings.total_s
    assert timings.prompt_tokens_per_second > 0
    assert timings.decode_tokens_per_second > 0


def test_text_prompts_are_encoded(engine):
    prompt = "In the beginning"
    by_text = engine.generate(prompt, max_new_tokens=4)
    assert (
        by_text.token_ids == engine.generate(engine.text.encode(prompt), max_new_tokens=4).token_ids
    )


def test_stream_gives_the_same_in_pieces(engine):
    arguments = {"max_new_tokens": 30, "temperature": 1.0, "seed": 3}
    stream = engine.stream(PROMPT, **arguments)
    pieces = list(stream)
    assert stream.result.text == "".join(piece.text for piece in pieces)
    assert stream.result.token_ids == tuple(t for piece in pieces for t in piece.token_ids)
    again = engine.generate(PROMPT, **arguments)
    assert (again.text, again.token_ids) == (stream.result.text, stream.result.token_ids)
    other = engine.generate(PROMPT, **{**arguments, "seed": 4})
    assert other.token_ids != again.token_ids


def test_stop_strings_cut_text_and_end(engine):
    arguments = {"max_new_tokens": 40, "temperature": 1.0, "seed": 11}
    whole = engine.generate(PROMPT, **arguments).text
    stop = whole[9:12]
    cut = engine.generate(PROMPT, stop=["never seen", stop], **arguments)
    assert cut.finish_reason == "stop"
    assert cut.text == whole[: whole.index(stop)]
    assert len(cut.token_ids) < 40


def test_eos_ends_and_is_no_text(engine, monkeypatch):
    plain = engine.generate(PROMPT, max_new_tokens=12, temperature=1.0, seed=2)
    place = next(i for i, t in enumerate(plain.token_ids) if t not in plain.token_ids[:i] and i > 3)
    monkeypatch.setattr(engine.text, "eos_token_ids", (plain.token_ids[place],))
    ended = engine.generate(PROMPT, max_new_tokens=12, temperature=1.0, seed=2)
    assert ended.token_ids == plain.token_ids[: place + 1]
    assert ended.finish_reason == "stop"
    assert ended.text == engine.text.decode(ended.token_ids[:-1])


def test_a_full_context_ends_with_length(engine):
    result = engine.generate([3] * 126, max_new_tokens=50, temperature=1.0, seed=0)
    assert result.finish_reason == "length"
    assert len(result.token_ids) == 3  # two more fit, and the logits of the last still give one
    assert len(engine.generate([3] * 128, max_new_tokens=9).token_ids) == 1


def test_ctrl_c_keeps_what_there_is(engine, monkeypatch):
    calls = []

    def decode(*arguments, plain=engine.executor.decode):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(engine.executor, "decode", decode)
    result = engine.generate(PROMPT, max_new_tokens=20, temperature=0)
    assert (result.finish_reason, len(result.token_ids)) == ("cancelled", 3)
    calls.clear()
    stream = engine.stream(PROMPT, max_new_tokens=20)
    assert len(list(stream)) == 3
    assert stream.result.finish_reason == "cancelled"


def test_ctrl_c_in_the_reader_and_early_ends_free_the_cache(engine):
    with engine.stream(PROMPT, max_new_tokens=20) as stream:
        next(stream)
        raise KeyboardInterrupt
    assert stream.result.finish_reason == "cancelled"
    stream = engine.stream(PROMPT, max_new_tokens=20)
    next(stream), next(stream)
    stream.close()
    assert len(stream.result.token_ids) == 2
    assert list(stream) == []


def test_a_failed_prefill_frees_the_cache(engine, monkeypatch):
    def broken(*arguments):
        raise ExecutionError("a worker died")

    monkeypatch.setattr(engine.executor.phases["prefill.host"], "run", broken)
    with pytest.raises(ExecutionError, match="worker"):
        engine.generate(PROMPT)


@pytest.mark.parametrize(
    ("prompt", "arguments", "error", "words"),
    [
        ("", {}, UsageError, "prompt is empty"),
        ([], {}, UsageError, "prompt is empty"),
        ([1, 503], {}, UsageError, r"token id 503 at place 1 .* 0\.\.502"),
        ([-1], {}, UsageError, "token id -1"),
        ([0.5], {}, UsageError, "whole numbers"),
        ([1] * 129, {}, ContextLengthError, "129 tokens.*128"),
        ([1], {"max_new_tokens": 0}, UsageError, "max_new_tokens=0"),
        ([1], {"top_p": 1.5}, UsageError, "top_p=1.5"),
        ([1], {"stop": ["a", ""]}, UsageError, "stop"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(engine, prompt, arguments, error, words):
    with pytest.raises(error, match=words):
        engine.generate(prompt, **arguments)


def test_logits_check_their_tokens(engine):
    for method in (engine.logits, engine.decode_logits):
        with pytest.raises(UsageError, match="empty"):
            method([])
        with pytest.raises(ContextLengthError, match=r"200 tokens.*128"):
            method([1] * 200)


def test_a_full_cache_is_named(engine):
    run = engine.executor
    held = [run.open() for _ in range(9)]
    for sequence in held[:8]:
        run.kv.reserve(sequence, 128)
    with pytest.raises(CapacityError, match=r"KV cache is full: 128 tokens asked for, 64 of 1088"):
        list(run.prefill(held[8], np.full(128, 7, np.int32)))
    for sequence in held:
        run.release(sequence)


def test_sequences_go_on_across_prefills(engine):
    """A second prefill behind a first is one longer prompt: the multi-turn case."""
    run, ids = engine.executor, np.arange(40, 90, dtype=np.int32)
    whole = engine.logits(ids.tolist())
    sequence = run.open()
    parts = [
        part.copy()
        for cut in (ids[:13], ids[13:14], ids[14:])
        for part in run.prefill(sequence, cut, every=True)
    ]
    run.release(sequence)
    error = np.linalg.norm(np.concatenate(parts) - whole, axis=1) / np.linalg.norm(whole, axis=1)
    assert np.median(error) < 5e-3


def test_checkpoint_without_tokenizer_works_by_ids(checkpoint):
    plan = hmc.compile(checkpoint("mixtral", "bf16"), max_context=64)
    with hmc.Engine(plan) as engine:
        result = engine.generate(PROMPT, max_new_tokens=3)
        assert (result.text, len(result.token_ids)) == ("", 3)
        with pytest.raises(UsageError, match="no tokenizer"):
            engine.generate("text")
        with pytest.raises(UsageError, match="no tokenizer"):
            engine.generate(PROMPT, stop="x")


def test_a_chat_is_continued_through_the_template(checkpoint):
    plan = hmc.compile(checkpoint("qwen3_moe", "fp8", with_tokenizer=True), max_context=64)
    chat = [{"role": "user", "content": "x"}]
    with hmc.Engine(plan) as engine:
        ids = engine.text.encode_chat(chat)
        result = engine.generate(chat, max_new_tokens=3, temperature=0)
        assert result.timings.prompt_tokens == len(ids) > len(engine.text.encode("x"))
        same = engine.generate(ids, max_new_tokens=3, temperature=0)
        assert result.token_ids == same.token_ids


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_homes_give_equal_logits_and_chunks_close_ones(checkpoint, family):
    directory = checkpoint(family, "fp8")
    ids = np.random.default_rng(0).integers(3, 503, 90).tolist()
    found = {}
    for name, chunk, home in (("a", 512, "mapped"), ("b", 512, "arena"), ("c", 33, "mapped")):
        with hmc.Engine(hmc.compile(directory, max_chunk=chunk), home=home) as engine:
            found[name] = engine.logits(ids)
    assert np.array_equal(found["a"], found["b"])
    error = np.linalg.norm(found["a"] - found["c"], axis=1) / np.linalg.norm(found["a"], axis=1)
    assert np.median(error) < 8e-3


@pytest.mark.slow
def test_dummy_weights_run_without_shards(checkpoint, tmp_path):
    source = checkpoint("deepseek_v3", "fp8")
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    plan = hmc.compile(tmp_path, dummy_weights=True, layers=2, max_context=64)
    with hmc.Engine(plan, dummy_weights=True) as engine:
        logits = engine.logits(PROMPT)
        assert logits.shape == (6, 503)
        assert np.isfinite(logits).all()
        assert logits.std() > 0


def test_kernels_used_are_those_that_ran(checkpoint):
    plan = hmc.compile(checkpoint("deepseek_v3", "bf16"), max_context=64)
    with hmc.Engine(plan) as engine:
        assert engine.executor.kernels_used == ()
        engine.logits(PROMPT)
        ran = engine.executor.kernels_used
        assert any(name.startswith("mla_prefill_bf16_" + plan.isa) for name in ran)
        assert any(name.startswith("gemm_bf16_" + plan.isa) for name in ran)
        assert not any(name.startswith("mla_attention") for name in ran)
        engine.decode_logits(PROMPT[:1])
        ran = engine.executor.kernels_used
        assert any(name.startswith("mla_attention_" + plan.isa) for name in ran)


def test_closed_engines_refuse(checkpoint):
    engine = hmc.Engine(hmc.compile(checkpoint("mixtral", "bf16"), max_context=64))
    engine.close()
    engine.close()
    for use in (engine.logits, engine.decode_logits, engine.generate):
        with pytest.raises(ExecutionError, match="closed"):
            use(PROMPT)


def test_machines_that_cannot_run_the_plan_are_refused(checkpoint, monkeypatch):
    plan = hmc.compile(checkpoint("mixtral", "fp8"), max_context=64)
    with monkeypatch.context() as patch:
        patch.setattr(isa, "cpu_flags", lambda: frozenset({"avx2"}))
        with pytest.raises(MachineError, match=r"needs .*fma"):
            hmc.Engine(plan)
    with monkeypatch.context() as patch:
        patch.setattr(executor, "available_bytes", lambda: 10_000)
        with pytest.raises(CapacityError, match=r"free; the largest part is"):
            hmc.Engine(plan)
    with monkeypatch.context() as patch:
        patch.setattr(executor, "memory_limit", lambda: 10_000)
        with pytest.raises(CapacityError, match=r"there; the largest part is"):
            hmc.Engine(plan)
