"""Whether layers that see a window keep all of a context, or rings of pages: the window and what
one call appends.

Contract
    * rings are for plans of the CPU alone, whose calls are chunks: on GPUs whole prompts are
      computed at once, and a later row of such a prompt would take the place of an earlier one
    * they are there where they take less than whole pages, together with the snapshots of the
      windows without which prompts that begin alike could not share pages of the other layers
    * every choice is a decision, with the bytes compared
"""

from __future__ import annotations

from hmc.passes.place.needs import with_snapshots
from hmc.passes.records import Notes
from hmc.plan import KVLayout
from hmc.plan.options import Options

_SUBJECT = "cache of windows"
_SNAPSHOTS = 4
"""Of what rings save, this part may go to more snapshots than there are sequences."""


def windowed(cache: KVLayout, options: Options, context: int, pages: int, notes: Notes) -> KVLayout:
    """The layout, without capacity, for contexts of so many tokens on the CPU alone, which has
    memory for so many whole pages.
    """
    if not _windows(cache):
        return cache
    room = min(options.max_chunk, context)
    rings = with_snapshots(cache.model_copy(update={"room": room}), options, pages)
    whole, less = (_bytes(each, pages) for each in (cache, rings))
    if least := min(rings.snapshots, options.max_batch):
        saved = whole - _bytes(rings.model_copy(update={"snapshots": least}), pages)
        spare = max(0, saved) // _SNAPSHOTS // rings.bytes_per_snapshot
        rings = rings.model_copy(update={"snapshots": min(rings.snapshots, least + spare)})
        less = _bytes(rings, pages)
    fewer = less < whole
    notes.decide(
        _SUBJECT,
        "rings" if fewer else "whole pages",
        f"{pages * cache.block} tokens take {less / 1e6:.1f} MB with rings of"
        f" {rings.bytes_per_sequence / 1e6:.1f} MB a sequence and {rings.snapshots} snapshots,"
        f" {whole / 1e6:.1f} MB with whole pages",
    )
    return rings if fewer else cache


def whole_windows(cache: KVLayout, notes: Notes) -> None:
    """Say that layers keep all of a context, where GPUs compute."""
    if _windows(cache):
        notes.decide(
            _SUBJECT, "whole pages", "GPUs compute whole prompts at once, which rings cannot hold"
        )


def _windows(cache: KVLayout) -> bool:
    return any(group.window for group in cache.groups)


def _bytes(cache: KVLayout, pages: int) -> int:
    return pages * cache.block * cache.bytes_per_token + cache.bytes_of_sequences
