"""Filling memory with weights: read from the shards, or random ones (dummy.py); hides threads."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.errors import ShardError
from hmc.formats import Form, matrix_of, told_by_dtype
from hmc.formats.arrange import arranged
from hmc.formats.decode import NUMPY, decode, floats
from hmc.plan.stored import part_shape
from hmc.runtime.weights.dummy import Patterns
from hmc.runtime.weights.tensors import Addresses, Key, TensorGroup, array_at

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is (bytes)."""

_STRIDE = 1_234_577  # through a pattern, so that experts start at different places
_CHUNK = 64 << 20  # bytes of one copy task
_AHEAD = 256  # tasks that wait


def read_spans(
    groups: Sequence[TensorGroup],
    shards: Sequence[Path],
    places: Mapping[Key, Addresses],
    progress: Progress | None,
) -> None:
    """Read each tensor from its shard to its address in `places`; those that memory holds otherwise
    are brought there on the way. `ShardError` when a shard cannot be read or ends too early.

    A failing disk is an error here instead of the signal that copying from mapped pages ends in.
    Neither is always the faster one: into private memory reading was up to half as fast again (no
    page of the shard has to be mapped), into a warm memory file once a fifth slower.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(path)) for path in shards]

        def tasks() -> Iterable[tuple[Callable[[], None], int]]:
            for group in groups:
                size = group.form.stored_bytes
                spans = zip(group.shards, group.offsets, places[group.key], strict=True)
                for shard, start, target in spans:
                    file, offset, to = files[int(shard)], int(start), int(target)
                    if group.parts:
                        yield partial(_put_together, group, files, to), size
                        continue
                    if group.copied:
                        yield partial(_read_anew, group.form, file, offset, to), size
                        continue
                    for at in range(0, size, _CHUNK):
                        part = min(_CHUNK, size - at)
                        yield partial(_read, file, offset + at, _bytes(to + at, part)), part

        total = sum(len(group.shards) * group.form.stored_bytes for group in groups)
        _run(tasks(), total, "loading weights", progress)


def fill_dummy(
    groups: Sequence[TensorGroup],
    places: Mapping[Key, Addresses],
    progress: Progress | None,
) -> None:
    """Write random weights with std 1/sqrt(fan_in)."""
    patterns = Patterns()

    def tasks() -> Iterable[tuple[Callable[[], None], int]]:
        number = 0
        for group in groups:
            pattern = patterns.of(group)
            for target in places[group.key]:
                number += 1
                size = group.form.bytes
                yield partial(_tile, pattern, number * _STRIDE, int(target), size), size

    total = sum(len(group.shards) * group.form.bytes for group in groups)
    _run(tasks(), total, "making dummy weights", progress)


def _opened(path: Path) -> FileIO:
    try:
        return FileIO(path)
    except FileNotFoundError:
        raise ShardError(f"{path}: shard is missing") from None
    except OSError as error:
        raise ShardError(f"{path}: cannot be read: {error.strerror}") from error


def _read(file: FileIO, offset: int, into: npt.NDArray[np.uint8]) -> None:
    """Fill `into` with what begins at `offset`; several threads may read a file."""
    done = 0
    while done < len(into):
        try:
            count = os.preadv(file.fileno(), [into[done:].data], offset + done)
        except OSError as error:
            raise ShardError(f"{file.name}: cannot be read: {error.strerror}") from error
        if count == 0:
            raise ShardError(
                f"{file.name}: ends at byte {offset + done}, within a tensor: the checkpoint"
                " changed while it was read"
            )
        done += count


def _run(
    tasks: Iterable[tuple[Callable[[], None], int]],
    total: int,
    what: str,
    progress: Progress | None,
) -> None:
    done = 0
    pending: deque[tuple[Future[None], int]] = deque()

    def finish_first() -> int:
        future, size = pending.popleft()
        future.result()
        if progress is not None:
            progress(what, done + size, total)
        return done + size

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "hmc-fill") as pool:
        for task, size in tasks:
            pending.append((pool.submit(task), size))
            if len(pending) >= _AHEAD:
                done = finish_first()
        while pending:
            done = finish_first()


def _bytes(address: int, size: int) -> npt.NDArray[np.uint8]:
    return array_at(address, np.dtype(np.uint8), (size,))


def _read_anew(form: Form, file: FileIO, offset: int, target: int) -> None:
    raw = np.empty(form.stored_bytes, np.uint8)
    _read(file, offset, raw)
    found = arranged(form, raw.view(NUMPY[form.plane.means(form.dtype)]))
    if form.widened:
        found = floats(found, form.plane.means(form.dtype))
    _bytes(target, form.bytes)[:] = np.ascontiguousarray(found).view(np.uint8).reshape(-1)


def _put_together(group: TensorGroup, files: Sequence[FileIO], target: int) -> None:
    """A plane from its parts: as they are stored where it has their dtype, else as what they mean
    in f32, which is exact.
    """
    rows, columns = matrix_of(group.form.shape)
    heads = rows // sum(part.rows for part in group.parts)
    kind = NUMPY[group.form.kept]
    whole = _bytes(target, group.form.bytes).view(kind).reshape(heads, -1, columns)
    first = 0
    for part in group.parts:
        raw = np.empty(part.bytes, np.uint8)
        _read(files[part.shard], part.offset, raw)
        row, shape = told_by_dtype()[part.dtype], part_shape(part, heads, columns)
        found: npt.NDArray[Any] = raw.view(NUMPY[row.codes.means(part.dtype)])
        if part.dtype != group.form.kept:
            found = decode(row, [found], [part.dtype], shape)
        by_head = found.reshape(heads, shape[0] // heads, shape[1])
        last = first + part.rows
        whole[:, first:last] = by_head.swapaxes(1, 2) if part.transposed else by_head
        first = last


def _tile(pattern: npt.NDArray[Any], start: int, target: int, size: int) -> None:
    """Fill `size` bytes at `target` with the pattern from element `start` on, round and round."""
    out = _bytes(target, size).view(pattern.dtype)
    at, place = 0, start % len(pattern)
    while at < len(out):
        count = min(len(out) - at, len(pattern) - place)
        out[at : at + count] = pattern[place : place + count]
        at, place = at + count, 0
