"""Which files of a model hmc needs: those that describe it, and its weights in one format."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from hmc.checkpoint.jsonfile import first_few
from hmc.errors import HubError
from hmc.hub.listing import HubFile, Listing

_PART = re.compile(r"(.*-)\d{5}(-of-(\d{5})\.gguf)")
_SAID = 12
"""GGUF files that an error names at most."""


@dataclass(frozen=True)
class Wanted:
    """`small` files are read whole; of `weights` a plan needs the headers. `gguf` is the first GGUF
    file, where weights are such.
    """

    small: tuple[HubFile, ...]
    weights: tuple[HubFile, ...]
    gguf: str = ""


def wanted(listing: Listing, *, weights: bool = True) -> Wanted:
    """The GGUF file that was asked for (all parts of a split one), else the safetensors shards,
    else the only GGUF file there is; without `weights` what describes the model alone.

    Raises `HubError` where none of these is there, or it is not clear which.
    """
    name, files = listing.name, listing.files
    top = [file for file in files.values() if "/" not in file.name]
    small = tuple(file for file in top if file.name.endswith((".json", ".jinja")))
    if not weights:
        return Wanted(small, ())
    models = _models(files)
    if name.file:
        if name.file not in models:
            raise HubError(
                f"{name}: no such file, or not the first part; {_listed(listing, models)}"
            )
        return _gguf(listing, name.file)
    shards = tuple(file for file in top if file.name.endswith(".safetensors"))
    if shards:
        return Wanted(small, shards)
    if len(models) == 1:
        return _gguf(listing, models[0])
    if models:
        raise HubError(f"{name}: which of its GGUF files? {_listed(listing, models)}")
    others = [each for each in files if each.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    reason = f"; hmc does not read {first_few(others, 2)}" if others else ""
    here = f" on this machine, and {listing.unasked}" if listing.unasked else ""
    raise HubError(f"{name}: no .safetensors and no .gguf file of it{here}{reason}")


def _models(files: Iterable[str]) -> list[str]:
    """GGUF files, of split ones the first."""
    found = []
    for name in sorted(files):
        match = _PART.fullmatch(name)
        if name.endswith(".gguf") and (match is None or name == f"{match[1]}00001{match[2]}"):
            found.append(name)
    return found


def _gguf(listing: Listing, first: str) -> Wanted:
    names = [first]
    if match := _PART.fullmatch(first):
        names = [f"{match[1]}{number:05}{match[2]}" for number in range(1, int(match[3]) + 1)]
    missing = [each for each in names if each not in listing.files]
    if missing:
        raise HubError(f"{listing.name}: {len(missing)} parts are missing: {first_few(missing)}")
    return Wanted((), tuple(listing.files[each] for each in names), first)


def _listed(listing: Listing, models: list[str]) -> str:
    if not models:
        return "there is no GGUF file in it"
    repo = str(listing.name).partition(":")[0]
    return f"take one of {first_few([f'{repo}:{each}' for each in models], _SAID)}"
