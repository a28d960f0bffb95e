"""GGUF files of the hub: what is read of them, and the files of a split one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_files import write_gguf
from hub_commands import COMMIT, Run, refused
from played_hub import PlayedHub

import hmc
from hmc.hub import cache

FIRST = "Q8/model-00001-of-00002.gguf"


@pytest.fixture
def split(hub: PlayedHub, checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """The first part of a file that a/b has in a folder, beside others."""
    folder = tmp_path / "published" / "Q8"
    folder.mkdir(parents=True)
    model = checkpoint("mixtral", "bf16")
    write_gguf(folder / "model.gguf", model, "BF16", split=20)
    (folder.parent / "other.gguf").write_bytes(b"another")
    (folder.parent / "config.json").write_text("{}")
    hub.add("a/b", folder.parent)
    return folder.parent / FIRST


def test_the_header_of_each_part_is_enough(hub: PlayedHub, run: Run, split: Path) -> None:
    refused(run("compile", "a/b"), 3, "which of its GGUF files?", f"a/b:{FIRST}", "a/b:other.gguf")
    code, out, err = run("compile", f"a/b:{FIRST}", "--no-fetch")
    assert code == 0 and out.startswith("model.hmp: "), err
    plan, whole = hmc.load_plan("model.hmp"), hmc.compile(split)
    assert plan.checkpoint.hub == f"a/b@{COMMIT}:{FIRST}"
    assert plan.checkpoint.shards == whole.checkpoint.shards
    assert plan.model_copy(update={"checkpoint": whole.checkpoint}) == whole
    assert hub.sent(".gguf") < sum(shard.size for shard in plan.checkpoint.shards) / 2
    refused(run("run", "model.hmp", "--ids", "1,2"), 3, "2 of 2 files", "hmc fetch model.hmp")


def test_all_parts_are_fetched(hub: PlayedHub, run: Run, split: Path) -> None:
    code, _, err = run("compile", f"a/b:{FIRST}")
    assert code == 0 and "[fetching 2 files" in err
    folder = cache.snapshot("a/b", COMMIT)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.gguf")} == {
        FIRST,
        "Q8/model-00002-of-00002.gguf",
    }
    assert run("fetch", "model.hmp")[0] == 0
