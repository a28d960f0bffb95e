"""Weights that are fetched: resumed, checked, and one line for all that goes wrong."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_commands import COMMIT, EXAMPLE, Run, refused
from huggingface_hub import constants
from played_hub import PlayedHub, believe

import hmc
from hmc.hub import cache, ranges
from hmc.hub.fetch import fetch
from hmc.hub.listing import look_up
from hmc.hub.names import HubName

NAME = "king/tiny-kjv"
SIZE = (EXAMPLE / "model.safetensors").stat().st_size


def weights() -> Path:
    """Where the weights are once they are fetched."""
    return cache.snapshot(NAME, COMMIT) / "model.safetensors"


def partials() -> list[Path]:
    return list(cache.storage(NAME).rglob("*.incomplete"))


def test_compile_fetches_what_the_plan_needs(king: PlayedHub, run: Run) -> None:
    king.models[NAME]["README.md"] = b"not needed"
    code, out, err = run("compile", NAME)
    assert code == 0 and out.startswith("tiny-kjv.hmp: "), err
    assert err.startswith(f"[fetching 1 file of {NAME}, 8.8 MB, into {weights().parent}]\n")
    assert "hashes checked" in err
    assert weights().read_bytes() == (EXAMPLE / "model.safetensors").read_bytes()
    assert not (weights().parent / "README.md").exists() and not partials()
    sent = king.sent()
    assert run("fetch", "tiny-kjv.hmp")[0] == 0
    assert run("compile", NAME)[0] == 0
    assert king.sent() == sent


def test_a_plan_without_its_files_says_how_to_fetch_them(king: PlayedHub, run: Run) -> None:
    run("compile", NAME, "--no-fetch")
    said = ("1 of 1 files of king/tiny-kjv@aaa", "`hmc fetch tiny-kjv.hmp`")
    for command in (("run", "tiny-kjv.hmp", "-p", "x"), ("serve", "tiny-kjv.hmp")):
        refused(run(*command), 3, *said)
    assert run("show", "tiny-kjv.hmp")[0] == 0
    code, out, err = run("fetch", "tiny-kjv.hmp")
    assert code == 0 and str(weights().parent) in out, err
    assert run("run", "tiny-kjv.hmp", "-p", "And", "-n", 1)[0] == 0


def test_a_plan_finds_its_files_in_the_cache_of_another_machine(
    king: PlayedHub, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run("compile", NAME)
    shutil.move(cache.folder(), tmp_path / "elsewhere")
    refused(run("run", "tiny-kjv.hmp", "-p", "x"), 3, "hmc fetch")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    assert run("run", "tiny-kjv.hmp", "-p", "And", "-n", 1)[0] == 0


def test_a_connection_that_breaks_is_taken_up_again(king: PlayedHub, run: Run) -> None:
    run("compile", NAME, "--no-fetch")
    before = king.sent(".safetensors")
    king.cuts = [1000, 1_000_000, 0, 5]
    assert run("compile", NAME)[0] == 0
    assert weights().stat().st_size == SIZE
    # headers once more, of which a part was lost; each byte of the file once
    assert king.sent(".safetensors") - before <= SIZE + 2 * before


def test_what_was_fetched_before_an_end_is_kept(king: PlayedHub, run: Run) -> None:
    run("compile", NAME, "--no-fetch")
    plan = hmc.load_plan("tiny-kjv.hmp")
    headers = king.sent(".safetensors")
    # the headers first, then 3 MB, then three times nothing
    king.cuts = [SIZE, SIZE, 3_000_000, 0, 0, 0]
    refused(run("fetch", "tiny-kjv.hmp"), 3, "model.safetensors", "cannot be reached")
    (partial,) = partials()
    assert partial.stat().st_size == 3_000_000 and not weights().exists()
    before = king.sent(".safetensors")
    code, _, err = run("fetch", "tiny-kjv.hmp")
    assert code == 0 and "5.8 MB" in err
    assert king.sent(".safetensors") - before == SIZE - 3_000_000 + headers
    assert hmc.load_plan("tiny-kjv.hmp") == plan and not partials()


def test_an_interrupt_ends_it_and_leaves_what_came(
    king: PlayedHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    run("compile", NAME, "--no-fetch")
    monkeypatch.setattr("hmc.hub.fetch.wait", interrupted)
    code, _, err = run("compile", NAME)
    assert code == 130 and err.endswith("hmc: cancelled\n")


def test_who_comes_second_waits_for_the_first(king: PlayedHub) -> None:
    """Each of two fetches the same file at the same time; it goes over the line once."""
    listing = look_up(HubName(NAME))
    files = tuple(listing.files.values())
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda _: fetch(listing, files, lambda *_: None, ""), range(2)):
            assert weights().stat().st_size == SIZE
    assert king.sent(".safetensors") == SIZE


def test_a_server_without_ranges_will_do(king: PlayedHub, run: Run) -> None:
    king.ranges = False
    king.cuts = [SIZE, 2_000_000]
    assert run("compile", NAME)[0] == 0
    assert weights().read_bytes() == (EXAMPLE / "model.safetensors").read_bytes()


def test_wrong_bytes_are_removed(king: PlayedHub, run: Run) -> None:
    king.wrong = True
    refused(run("compile", NAME), 3, "model.safetensors: its hash is not", "begin again")
    assert not weights().exists() and not partials()
    king.wrong = False
    assert run("fetch", "tiny-kjv.hmp")[0] == 0


def test_a_file_that_changed_since_the_plan_is_refused(king: PlayedHub, run: Run) -> None:
    """Before anything of it is fetched."""
    run("compile", NAME, "--no-fetch")
    before = king.sent(".safetensors")
    shard = king.models[NAME]["model.safetensors"]
    king.models[NAME]["model.safetensors"] = shard.replace(b"model.layers.0", b"model.layers.9")
    refused(run("fetch", "tiny-kjv.hmp"), 5, "king/tiny-kjv/model.safetensors: its header differs")
    assert king.sent(".safetensors") - before < SIZE / 10
    del king.models[NAME]["model.safetensors"]
    king.models[NAME]["other.safetensors"] = shard
    refused(run("fetch", "tiny-kjv.hmp"), 3, "model.safetensors: not there any more")


def test_a_file_that_changes_while_it_is_fetched_is_refused(
    king: PlayedHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = ranges._skipped

    def longer(listing: object, file: object, found: SimpleNamespace, begin: int) -> int:
        found.headers["Content-Range"] = f"bytes 0-1/{SIZE + 1}"
        return answer(listing, file, found, begin)  # type: ignore[arg-type]

    run("compile", NAME, "--no-fetch")
    monkeypatch.setattr(ranges, "_skipped", longer)
    refused(run("compile", NAME), 3, "it changed meanwhile, begin again")


def test_a_kept_plan_of_another_file_is_compiled_again(king: PlayedHub, run: Run) -> None:
    """Which no hub that keeps its commits makes of it."""
    assert run("show", NAME)[0] == 0
    shard = king.models[NAME]["model.safetensors"]
    length = 8 + int.from_bytes(shard[:8], "little")
    header = shard[8:length].rstrip().replace(b'"dtype"', b' "dtype"', 1).ljust(length)
    longer = len(header).to_bytes(8, "little") + header + shard[length:]
    king.models[NAME]["model.safetensors"] = longer
    refused(run("run", NAME, "-p", "x"), 5, "the checkpoint changed, compile it again")
    code, _, err = run("run", NAME, "-p", "And", "-n", 1)
    assert code == 0 and "[compiled king/tiny-kjv@" in err


def test_without_room_nothing_is_fetched(
    king: PlayedHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("compile", NAME, "--no-fetch")
    before = king.sent(".safetensors")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    refused(run("fetch", "tiny-kjv.hmp"), 3, "0.0 GB are to be fetched", "0.0 GB left")
    assert king.sent(".safetensors") - before < SIZE / 10


def test_a_cache_that_cannot_be_written(king: PlayedHub, run: Run) -> None:
    cache.folder().write_text("in the way")
    refused(run("compile", NAME), 3, str(cache.folder()), "cannot be written")


def test_gated_models(king: PlayedHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    king.token = "hf_right"
    said = ("gated: accept its licence on http://127.0.0.1", "set HF_TOKEN")
    refused(run("compile", NAME), 3, *said)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refused(run("compile", NAME), 3, *said)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert run("compile", NAME)[0] == 0
    given = {r.authorization for r in king.requests if r.path.startswith("/storage")}
    assert given == {""}  # no token goes to another host


def test_what_the_hub_does_not_have(king: PlayedHub, run: Run) -> None:
    refused(run("compile", "king/nothing"), 3, "king/nothing: not here, and http", "HF_TOKEN")
    refused(run("compile", f"{NAME}@v9"), 3, f"{NAME}@v9: ", "no revision v9")
    refused(run("run", f"{NAME}:m.gguf"), 3, "no such file", "no GGUF file in it")
    refused(run("run", "king/nothing.gguf"), 2, "no hub id")
    assert not [r for r in king.requests if "gguf" in r.path]


def test_servers_that_are_no_hub(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for url, said in (
        ("nowhere", "nowhere cannot be reached"),
        ("http://[", "http://[ cannot be reached"),
    ):
        believe(url, monkeypatch)
        refused(run("compile", NAME), 3, said)


def _about(**file: object) -> bytes:
    return json.dumps({"id": "a/b", "sha": COMMIT, "siblings": [file]}).encode()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"<html>", "does not answer as a hub does"),
        (b"[]", "does not answer as a hub does"),
        (b'{"id": "a/b"}', "it names no commit"),
        (_about(rfilename="x", size=1), "no hash of x"),
        (_about(rfilename="x", size=1, blobId="../y"), "no hash of x"),
        (_about(rfilename="../x", size=1, blobId=COMMIT), "a file '../x'"),
    ],
)
def test_answers_that_are_none(hub: PlayedHub, run: Run, answer: bytes, said: str) -> None:
    hub.answer = answer
    refused(run("compile", NAME), 3, said)


def test_without_a_network(king: PlayedHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in the cache will do, and that is said."""
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    refused(run("compile", NAME), 3, f"{NAME}: {nowhere} cannot be reached")
    monkeypatch.setattr(constants, "ENDPOINT", king.url)
    run("compile", NAME)
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    code, _, err = run("compile", NAME)
    assert code == 0 and f"taking what is on this machine of {NAME}@aaaaaaaaaaaa]" in err


def test_offline(king: PlayedHub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(value: bool) -> None:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", value)

    offline(True)
    refused(run("compile", NAME), 3, "HF_HUB_OFFLINE is set", "has nothing of it")
    assert not king.requests
    offline(False)
    run("compile", NAME, "--no-fetch")
    offline(True)
    refused(run("compile", NAME), 3, "no .safetensors", "HF_HUB_OFFLINE is set")
    refused(run("fetch", "tiny-kjv.hmp"), 3, "no .safetensors", "HF_HUB_OFFLINE is set")
    offline(False)
    run("fetch", "tiny-kjv.hmp")
    offline(True)
    assert run("compile", NAME)[0] == 0
    assert run("run", NAME, "-p", "And", "-n", 1)[0] == 0


def test_what_is_not_fetched_unless_asked_for(
    king: PlayedHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("compile", NAME, "--machine", "laptop")[2].startswith("[8.8 MB not fetched")
    monkeypatch.setattr(hmc.Plan, "too_large", {"host": 1})
    assert "not fetched" in run("compile", NAME)[2]
    refused(run("run", NAME, "-p", "x"), 5, "too small", "nothing was fetched")
    assert run("compile", NAME, "--machine", "laptop", "--fetch")[0] == 0 and weights().exists()


@pytest.mark.parametrize(("typed", "fetched"), [(True, True), (False, False)])
def test_on_a_terminal_it_asks(
    king: PlayedHub, run: Run, monkeypatch: pytest.MonkeyPatch, typed: bool, fetched: bool
) -> None:
    asked: list[str] = []

    def confirm(text: str, **_: object) -> bool:
        asked.append(text)
        return typed

    monkeypatch.setattr("click.confirm", confirm)
    for stream in ("stdin", "stderr"):
        monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: True)
    code, _, err = run("compile", NAME)
    assert code == 0 and asked == [f"Fetch 8.8 MB of {NAME}?"]
    assert weights().exists() == fetched != ("not fetched" in err)


def test_without_the_library_it_says_what_to_install(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("hmc.hub.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(run("compile", NAME), 2, "huggingface_hub", "pip install 'hmc[hub]'")


def test_fetch_refuses_plans_of_other_checkpoints(run: Run) -> None:
    run("compile", EXAMPLE)
    refused(run("fetch", "tiny-kjv.hmp"), 2, "not from a hub id")
