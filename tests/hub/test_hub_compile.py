"""Plans of hub ids by headers alone, and what is read for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from hub_commands import COMMIT, EXAMPLE, Run, refused
from huggingface_hub import snapshot_download
from played_hub import PlayedHub

import hmc
from hmc.hub import cache


def _same(one: hmc.Plan, other: hmc.Plan) -> bool:
    """Whether two plans differ in nothing but where their checkpoint is."""
    checkpoint = other.checkpoint
    return one.model_copy(update={"checkpoint": checkpoint}) == other and (
        one.checkpoint.shards == checkpoint.shards
        and one.checkpoint.config_sha256 == checkpoint.config_sha256
    )


def test_headers_are_enough_for_the_plan_of_the_whole(king: PlayedHub, run: Run) -> None:
    code, out, err = run("compile", "king/tiny-kjv", "--no-fetch")
    assert code == 0, err
    assert out.startswith("tiny-kjv.hmp: DeepseekV3ForCausalLM, 5 layers")
    assert "host memory" in out and "prediction" in out
    assert err == "[8.8 MB not fetched: `hmc fetch tiny-kjv.hmp` does that]\n"
    plan = hmc.load_plan("tiny-kjv.hmp")
    assert _same(plan, hmc.compile(EXAMPLE))
    assert plan.checkpoint.hub == f"king/tiny-kjv@{COMMIT}"
    shard = plan.checkpoint.shards[0]
    assert king.sent(".safetensors") == shard.header_bytes < shard.size / 100
    assert not list(cache.snapshot("king/tiny-kjv", COMMIT).glob("*.safetensors"))


def test_of_many_shards_the_headers_alone_are_read(
    hub: PlayedHub, run: Run, checkpoint: Callable[..., Path]
) -> None:
    """Only of those that the index names."""
    model = checkpoint("qwen3_moe", "fp8", shards=3)
    hub.add("a/b", model)
    hub.models["a/b"]["consolidated.safetensors"] = b"others"
    assert run("compile", "a/b", "--no-fetch", "-o", "plan.hmp")[0] == 0
    plan = hmc.load_plan("plan.hmp")
    assert _same(plan, hmc.compile(model)) and len(plan.checkpoint.shards) == 3
    most = sum(max(1 << 16, shard.header_bytes) for shard in plan.checkpoint.shards)
    assert hub.sent("of-00003.safetensors") <= most
    assert not hub.sent("consolidated.safetensors")


def test_a_revision_is_kept(king: PlayedHub, run: Run) -> None:
    king.revisions["v1"] = "b" * 40
    assert run("compile", "king/tiny-kjv@v1", "--no-fetch")[0] == 0
    assert hmc.load_plan("tiny-kjv.hmp").checkpoint.hub == f"king/tiny-kjv@{'b' * 40}"


def test_dummy_weights_need_no_weights(king: PlayedHub, run: Run) -> None:
    files = king.models["king/tiny-kjv"]
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    code, _, err = run("compile", "king/tiny-kjv", "--dummy-weights", "--layers", 2, "-o", "p.hmp")
    assert code == 0, err
    assert hmc.load_plan("p.hmp").model.layers == 2 and not king.sent(".bin")
    refused(run("compile", "king/tiny-kjv"), 3, "no .safetensors", "pytorch_model.bin")
    assert not Path("tiny-kjv.hmp").exists()


def test_what_another_client_has_fetched_is_not_fetched(king: PlayedHub, run: Run) -> None:
    """The library itself, for one."""
    snapshot_download("king/tiny-kjv", cache_dir=cache.folder(), max_workers=1)
    before = king.sent()
    code, out, err = run("compile", "king/tiny-kjv", "--json")
    assert code == 0 and king.sent() == before, err
    assert json.loads(out)["missing"] == 0
    assert json.loads(out)["hub"] == f"king/tiny-kjv@{COMMIT}"


def _without(files: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {each: data for each, data in files.items() if each != name}


def test_errors_in_headers_name_the_model(hub: PlayedHub, run: Run) -> None:
    hub.add("a/b", EXAMPLE)
    whole = hub.models["a/b"]
    shard = whole["model.safetensors"]
    cases: list[tuple[dict[str, bytes], int, str, str]] = [
        ({"model.safetensors": (1 << 40).to_bytes(8, "little") + shard[8:]}, 3,
         "a/b/model.safetensors: ", "over the cap"),
        ({"model.safetensors": shard[:-1]}, 3, "a/b/model.safetensors: ", "truncated"),
        ({"config.json": b"{}"}, 3, "a/b/config.json: ", "model_type"),
        (_without(whole, "config.json"), 3, "a/b/config.json: ", "no such file"),
    ]  # fmt: skip
    for number, (changed, code, *parts) in enumerate(cases):
        hub.models["a/b"] = changed if len(changed) > 1 else whole | changed
        hub.revisions["main"] = f"{number:040x}"
        refused(run("compile", "a/b"), code, *parts)
    assert not list(Path.cwd().iterdir())


def test_a_local_path_needs_no_output_either(run: Run) -> None:
    shutil.copytree(EXAMPLE, "mine")
    assert run("compile", "mine")[1].startswith("mine.hmp: ")
    refused(run("compile", "mine/nothing/there"), 2, "no hub id, which is org/name")
