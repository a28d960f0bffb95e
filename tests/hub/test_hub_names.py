"""Which arguments are hub ids, and which files of a model are taken."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hmc.cli.hub import hub_name
from hmc.errors import HubError, UsageError
from hmc.hub.listing import HubFile, Listing
from hmc.hub.names import HubName
from hmc.hub.wanted import Wanted, wanted


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("Qwen/Qwen3-30B-A3B-FP8", ("Qwen/Qwen3-30B-A3B-FP8", "", "")),
        ("Qwen/Qwen2.5-7B@main", ("Qwen/Qwen2.5-7B", "main", "")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1", "")),
        ("a/b:Q4/m-00001-of-00002.gguf", ("a/b", "", "Q4/m-00001-of-00002.gguf")),
        ("a/b-GGUF@v1.0:m.gguf", ("a/b-GGUF", "v1.0", "m.gguf")),
    ],
)
def test_hub_ids(argument: str, parts: tuple[str, str, str]) -> None:
    found = HubName.parse(argument)
    assert found == HubName(*parts)
    assert str(found) == argument


NO_IDS = """model ./a/b ../b /a/b a/b/c a/ /b a/.b .a/b a/b.gguf a/plan.hmp a/config.json
a/b.safetensors a/b:c a/b:../c.gguf a/b:/c.gguf a/b@ a/b@../x a/b@x/../y a/b@x//y
a/b:c//d.gguf a\\b ~/b a/b?c é/b""".split()


@pytest.mark.parametrize("argument", [*NO_IDS, "", "a b/c", "a/b\n", "\0"])
def test_what_is_no_hub_id_is_not_asked_for(argument: str) -> None:
    assert HubName.parse(argument) is None


@pytest.mark.parametrize("argument", ["model", "./a/b", "a/b.gguf", "a b/c", "a/b:c", "\0"])
def test_an_error_says_what_a_hub_id_is(argument: str) -> None:
    with pytest.raises(UsageError, match=r"no hub id, which is org/name|cannot be looked up"):
        hub_name(argument)


def test_what_is_here_wins() -> None:
    Path("Qwen/model").mkdir(parents=True)
    assert hub_name("Qwen/model") is None
    assert hub_name("Qwen/other") == HubName("Qwen/other")


def _listing(*names: str, file: str = "", unasked: str = "") -> Listing:
    files = {name: HubFile(name, 1, "0" * 64) for name in names}
    return Listing(HubName("a/b", "", file), "c" * 40, files, unasked)


def _names(found: Wanted) -> tuple[list[str], list[str]]:
    return [file.name for file in found.small], [file.name for file in found.weights]


def test_safetensors_and_what_describes_them() -> None:
    listing = _listing(
        "README.md", "config.json", "model.safetensors", "chat_template.jinja", "m.gguf",
        "original/config.json", "original/model.safetensors", "pytorch_model.bin",
    )  # fmt: skip
    small = ["config.json", "chat_template.jinja"]
    assert _names(wanted(listing)) == (small, ["model.safetensors"])
    assert _names(wanted(listing, weights=False)) == (small, [])


def test_gguf_files() -> None:
    parts = ["Q4/m-00001-of-00002.gguf", "Q4/m-00002-of-00002.gguf"]
    listing = _listing("README.md", "m-Q8.gguf", *parts, file=parts[0])
    assert wanted(listing) == Wanted((), tuple(listing.files[name] for name in parts), parts[0])
    assert wanted(_listing("config.json", *parts)).gguf == parts[0]


UNCLEAR = [
    (
        _listing("m-Q4.gguf", "m-Q8.gguf"),
        "which of its GGUF files? take one of a/b:m-Q4.gguf, a/b:",
    ),
    (_listing("m-Q4.gguf", file="m.gguf"), "a/b:m.gguf: no such file"),
    (_listing("m-Q4.gguf", file="m.gguf"), "take one of a/b:m-Q4.gguf"),
    (_listing("model.safetensors", file="m.gguf"), "no GGUF file in it"),
    (_listing("m-00001-of-00002.gguf"), "1 parts are missing: m-00002-of-00002.gguf"),
    (_listing("m-00002-of-00002.gguf", file="m-00002-of-00002.gguf"), "not the first part"),
    (_listing("pytorch_model.bin"), "no .safetensors and no .gguf file of it; hmc does not read"),
    (_listing("consolidated.00.pth"), "does not read consolidated.00.pth"),
    (_listing("README.md", unasked="offline"), "file of it on this machine, and offline"),
]


@pytest.mark.parametrize(("listing", "said"), UNCLEAR)
def test_files_that_are_not_clear(listing: Listing, said: str) -> None:
    with pytest.raises(HubError, match=re.escape(said)):
        wanted(listing)
