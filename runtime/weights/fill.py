"""Filling memory with weights: read from the shards, or random ones (dummy.py); hides threads.

What lies on several NUMA nodes is written by threads of the node that keeps it.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.errors import ShardError, TensorError
from hmc.formats import DTYPE_BITS, Form, matrix_of, told_by_dtype
from hmc.formats.arrange import arranged
from hmc.formats.decode import NUMPY, decode, floats
from hmc.plan import StoredPick
from hmc.plan.stored import part_shape, picked_bytes, picked_rows
from hmc.runtime.weights.dummy import Patterns
from hmc.runtime.weights.placing import Crew, Placed, crews, pin
from hmc.runtime.weights.tensors import Addresses, Key, TensorGroup, array_at

Task = tuple[Callable[[], None], int, int]
"""What is to be done, the bytes that it makes, and the address where they begin."""
Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is (bytes)."""

_STRIDE = 1_234_577  # through a pattern, so that experts start at different places
_CHUNK = 64 << 20  # bytes of one copy task
_PICKED = 16 << 20  # the same of rows of which some are picked
_AHEAD = 256  # tasks that wait


def read_spans(
    groups: Sequence[TensorGroup],
    shards: Sequence[Path],
    places: Mapping[Key, Addresses],
    progress: Progress | None,
    placed: Placed | None = None,
) -> None:
    """Read each tensor from its shard to its address in `places`; those that memory holds otherwise
    are brought there on the way. `ShardError` when a shard cannot be read or ends too early.

    A failing disk is an error here instead of the signal that copying from mapped pages ends in.
    Neither is always the faster one: into private memory reading was up to half as fast again (no
    page of the shard has to be mapped), into a warm memory file once a fifth slower.
    """
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(path)) for path in shards]

        def tasks() -> Iterable[Task]:
            for group in groups:
                size = group.form.stored_bytes
                spans = zip(group.shards, group.offsets, places[group.key], strict=True)
                for number, (shard, start, target) in enumerate(spans):
                    file, offset, to = files[int(shard)], int(start), int(target)
                    if group.parts:
                        yield partial(_put_together, group, files, to), size, to
                        continue
                    if group.pick is not None and group.form.as_stored:
                        yield from _picking(group.form, group.pick, file, offset, to)
                        continue
                    if group.copied:
                        yield partial(_read_anew, group, number, files, to), size, to
                        continue
                    for at, part in _chunks(to, size, placed):
                        read = partial(_read, file, offset + at, _bytes(to + at, part))
                        yield read, part, to + at

        total = sum(len(group.shards) * group.form.stored_bytes for group in groups)
        _run(tasks(), total, "loading weights", progress, placed)


def fill_dummy(
    groups: Sequence[TensorGroup],
    places: Mapping[Key, Addresses],
    progress: Progress | None,
    placed: Placed | None = None,
) -> None:
    """Write random weights with std 1/sqrt(fan_in)."""
    patterns = Patterns()

    def tasks() -> Iterable[Task]:
        number = 0
        for group in groups:
            pattern = patterns.of(group)
            for target in places[group.key]:
                number += 1
                to, start = int(target), number * _STRIDE
                for at, size in _chunks(to, group.form.bytes, placed):
                    here = start + at // pattern.itemsize
                    yield partial(_tile, pattern, here, to + at, size), size, to + at

    total = sum(len(group.shards) * group.form.bytes for group in groups)
    _run(tasks(), total, "making dummy weights", progress, placed)


def _chunks(to: int, size: int, placed: Placed | None) -> Iterable[tuple[int, int]]:
    """(first byte, bytes) of the copies that make `size` bytes at `to`, each on one node."""
    for at in range(0, size, _CHUNK):
        end = min(size, at + _CHUNK)
        if placed is None:
            yield at, end - at
            continue
        for begin, stop, _ in placed.regions.cut(to + at, to + end):
            yield begin - to, stop - begin


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
    tasks: Iterable[Task],
    total: int,
    what: str,
    progress: Progress | None,
    placed: Placed | None,
) -> None:
    done = 0
    pending: deque[tuple[Future[None], int]] = deque()

    def finish_first() -> int:
        future, size = pending.popleft()
        future.result()
        if progress is not None:
            progress(what, done + size, total)
        return done + size

    with _crew(placed) as (crew, team):
        for task, size, address in tasks:
            pending.append((crew(task, team(address)), size))
            if len(pending) >= _AHEAD:
                done = finish_first()
        while pending:
            done = finish_first()


@contextmanager
def _crew(placed: Placed | None) -> Iterator[tuple[Crew, Callable[[int], int]]]:
    """Threads that do tasks, and whose an address is: everybody's, where memory is of one node."""
    if placed is None:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "hmc-fill") as pool:
            yield lambda task, _: pool.submit(task), lambda _: 0
        return
    with crews(placed.teams, lambda number: pin(placed.teams[number])) as crew:
        yield crew, placed.regions.team


def _bytes(address: int, size: int) -> npt.NDArray[np.uint8]:
    return array_at(address, np.dtype(np.uint8), (size,))


def _picking(
    form: Form, pick: StoredPick, file: FileIO, offset: int, target: int
) -> Iterable[Task]:
    """Tasks that read a plane of which a pick is made, some stored rows at a time."""
    stored = picked_bytes(form, pick) // _stored_rows(form, pick)
    step = max(1, _PICKED // stored)
    into = _bytes(target, form.bytes)
    whole, own = _stored_rows(form, pick), form.stored_bytes
    for first in range(0, whole, step):
        last = min(whole, first + step)
        yield (
            partial(_pick_some, form, pick, file, offset + first * stored, into, first, last),
            own * last // whole - own * first // whole,
            target + own * first // whole,
        )


def _stored_rows(form: Form, pick: StoredPick) -> int:
    """Rows of a plane of which a pick is made, as it is stored."""
    return math.prod(form.stored[1:]) if pick.transposed else pick.rows


def _pick_some(
    form: Form,
    pick: StoredPick,
    file: FileIO,
    offset: int,
    into: npt.NDArray[np.uint8],
    first: int,
    last: int,
) -> None:
    """Put what is picked of the stored rows [first, last), which begin at `offset`, where it
    belongs.
    """
    size = picked_bytes(form, pick) // _stored_rows(form, pick)
    raw = np.empty((last - first) * size, np.uint8)
    _read(file, offset, raw)
    word = np.dtype(f"u{DTYPE_BITS[form.dtype] // 8}")
    some, parts = raw.view(word).reshape(last - first, -1), picked_rows(form, pick)
    out, done = into.view(word).reshape(sum(map(len, parts)), -1), 0
    for rows in parts:
        own, done = out[done : done + len(rows)], done + len(rows)
        if pick.transposed:
            own[:, first:last] = some[:, rows.start : rows.stop : rows.step].T
            continue
        here = range(*(_place(rows, row) for row in (first, last)))
        if here:
            start = rows[here.start] - first
            own[here.start : here.stop] = some[start :: rows.step][: len(here)]


def _place(rows: range, row: int) -> int:
    """How many of `rows` are before `row`."""
    return min(len(rows), max(0, -(-(row - rows.start) // rows.step)))


def _read_anew(group: TensorGroup, number: int, files: Sequence[FileIO], target: int) -> None:
    """Tensor `number` of a group."""
    form, found = group.form, _arranged(group, number, files)
    if form.widened:
        found = floats(found, form.plane.means(form.dtype))
    _bytes(target, form.bytes)[:] = np.ascontiguousarray(found).view(np.uint8).reshape(-1)


def _arranged(group: TensorGroup, number: int, files: Sequence[FileIO]) -> npt.NDArray[Any]:
    form, pick = group.form, group.pick
    file, offset = files[int(group.shards[number])], int(group.offsets[number])
    raw = np.empty(form.stored_bytes, np.uint8)
    if pick is None:
        _read(file, offset, raw)
    else:
        _pick_some(form, pick, file, offset, raw, 0, _stored_rows(form, pick))
    order = None if group.order is None else _arranged(group.order, number, files)
    try:
        return arranged(form, raw.view(NUMPY[form.plane.means(form.dtype)]), order)
    except TensorError as error:
        raise TensorError(f"{file.name}: {group.name(number)}: {error}") from error


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
