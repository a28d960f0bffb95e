"""What `numa.check` runs on the machine of several nodes: loads plans, looks where every page of
their weights and cache lies, compares tokens with those of one node, and does so once more where
the kernel forbids the calls that place memory.

A page is where it should be when it is on the node whose workers multiply the rows in it, by the
rule that kernels split rows by, written down here a second time.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL, Structure, byref, c_long, c_ubyte, c_ushort, c_void_p, cast
from itertools import accumulate
from pathlib import Path

import numpy as np

import hmc
from hmc.machine.topology import this_machine
from hmc.runtime.engine import Engine
from hmc.runtime.memory.nodes import where

MODELS = ("tiny", "sized")
PROMPT = [40, 41, 42, 43]
TOKENS = 4
_PAGE = 4096
_FORBIDDEN = (237, 238)  # mbind, set_mempolicy


class Report:
    """Lines of checks; `bad` counts those that were wrong."""

    def __init__(self) -> None:
        self.bad = 0

    def check(self, what: str, right: bool, detail: str = "") -> None:
        """One line."""
        self.bad += not right
        print("ok   " if right else "WRONG", what, f"({detail})" if detail else "", flush=True)


def wanted(engine: Engine) -> Iterator[tuple[int, int, int]]:
    """(begin, end, node) of every team's rows of every plane of every weight."""
    teams = engine.executor.pool.teams
    bounds = [0, *accumulate(len(team.cpus) for team in teams)]
    store = engine.executor.store
    for group in store._groups:
        blocks = -(-group.rows // 16)
        edges = [min(group.rows, 16 * (blocks * bound // bounds[-1])) for bound in bounds]
        for address in store._places[group.key].tolist():
            at = [address + group.form.bytes * edge // group.rows for edge in edges]
            for begin, end, team in zip(at, at[1:], teams, strict=False):
                yield begin, end, team.memory


def weights(report: Report, engine: Engine, when: str) -> None:
    """Pages that are of one part alone, and those that are of two."""
    clear = {node: [] for node in range(64)}
    shared = 0
    for begin, end, node in wanted(engine):
        first, last = -(-begin // _PAGE) * _PAGE, end // _PAGE * _PAGE
        clear[node].append(np.arange(first, last, _PAGE))
        shared += first > begin
    for node, parts in clear.items():
        if parts:
            pages = np.concatenate(parts)
            found = where(pages)
            right = int((found == node).sum())
            detail = f"{right} of {len(pages)}; {shared} pages of two parts beside them"
            if right < len(pages):
                odd, counts = np.unique(found[found != node], return_counts=True)
                detail += f"; elsewhere {dict(zip(odd.tolist(), counts.tolist(), strict=True))}"
            report.check(f"{when}: weights of node {node} lie there", right == len(pages), detail)


def cache(report: Report, engine: Engine) -> None:
    """Pages of the cache lie on all nodes alike, once all are there."""
    memory = engine.executor.kv._memory
    memory.array[::_PAGE] = 0
    found = where(np.arange(memory.address, memory.address + memory.size, _PAGE))
    counts = {team.memory: 0 for team in engine.executor.pool.teams}
    for node in found[found >= 0].tolist():
        counts[node] += 1
    even = max(counts.values()) - min(counts.values()) <= 2 + sum(counts.values()) // 10
    report.check("cache is spread", even, str(counts))


@contextmanager
def watched(report: Report, engine: Engine) -> Iterator[None]:
    """Look again and again on which CPU each worker is while the block runs."""
    threads = {t.name: t.native_id for t in threading.enumerate() if t.name.startswith("hmc-")}
    seen: dict[str, set[int]] = {name: set() for name in threads}
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            for name, thread in threads.items():
                fields = Path(f"/proc/self/task/{thread}/stat").read_text().rsplit(")", 1)[1]
                seen[name].add(int(fields.split()[36]))
            time.sleep(0.02)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
    homes = {cpu: node.id for node in this_machine().nodes for cpu in node.cpus}
    for index, cpu in enumerate(engine.executor.pool.cpus):
        nodes = {homes[each] for each in seen[f"hmc-{index}"]}
        report.check(f"worker {index} stays on node {homes[cpu]}", nodes == {homes[cpu]})


def run(report: Report, folder: Path, name: str, home: str) -> None:
    """A plan on all nodes, and on one."""
    plan = hmc.load_plan(folder / f"{name}.hmp")
    answers = json.loads((folder / "answers.json").read_text())
    dummy = name == "sized"
    began = time.monotonic()
    with Engine(plan, dummy_weights=dummy, home=home) as engine:
        print(f"{name} {home}: {engine.executor.placed}; {time.monotonic() - began:.1f} s")
        weights(report, engine, f"{name} {home}, loaded")
        with watched(report, engine):
            found = engine.generate(PROMPT, max_new_tokens=TOKENS, temperature=0)
        print(f"{name} {home}: ran after {time.monotonic() - began:.1f} s")
        same = list(found.token_ids) == answers[name]
        report.check(f"{name} {home}: greedy tokens are those of one node", same)
        weights(report, engine, f"{name} {home}, after a run")
        if "forbidden" not in sys.argv:
            cache(report, engine)


def main(folder: Path) -> int:
    """Checks that were wrong."""
    report = Report()
    nodes = this_machine().nodes
    report.check("several nodes", len(nodes) > 1, str([node.cpus for node in nodes]))
    if report.bad:
        print("NUMA_VM=COMMAND runs what follows it on a machine of several nodes")
        return report.bad
    if "forbidden" in sys.argv:
        # The kernel moves what is not bound to who reads it: here that would be the one process.
        Path("/proc/sys/kernel/numa_balancing").write_text("0")
        forbid()
        run(report, folder, "sized", "arena")
        return report.bad
    run(report, folder, "sized", "arena")
    run(report, folder, "tiny", "shared")
    # Where the calls are forbidden, in a process of its own: there is no way back.
    child = os.spawnv(
        os.P_WAIT, sys.executable, [sys.executable, "-m", "numa.inside", str(folder), "forbidden"]
    )
    report.check("the same where the kernel forbids to place memory", child == 0)
    return report.bad


class _Filter(Structure):
    _fields_ = (("length", c_ushort), ("code", c_void_p))


def forbid() -> None:
    """mbind and set_mempolicy fail with EPERM from now on, as in a container (a seccomp filter)."""
    load, equal, give = 0x20, 0x15, 0x06
    code = struct.pack("HBBI", load, 0, 0, 0)
    for left, number in zip((1, 0), _FORBIDDEN, strict=True):
        code += struct.pack("HBBI", equal, left, 0 if left else 1, number)
    code += struct.pack("HBBI", give, 0, 0, 0x00050001) + struct.pack(
        "HBBI", give, 0, 0, 0x7FFF0000
    )
    held = (c_ubyte * len(code)).from_buffer_copy(code)
    program = _Filter(len(code) // 8, cast(held, c_void_p))
    libc = CDLL(None, use_errno=True)
    assert libc.prctl(38, c_long(1), c_long(0), c_long(0), c_long(0)) == 0  # no new privileges
    # of all threads (TSYNC): numpy's are there already
    assert libc.syscall(c_long(317), c_long(1), c_long(1), byref(program)) == 0


if __name__ == "__main__":
    sys.exit(min(100, main(Path(sys.argv[1]))))
