"""The plan file: canonical, deterministic, refused when it is not what it was."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import hmc
from hmc.errors import PlanError, PlanFormatError, VerifyError
from hmc.plan import Plan, load_plan, save_plan
from hmc.plan.model import SCHEMA_VERSION, CheckpointInfo
from hmc.plan.verify import verify_plan


@pytest.fixture(scope="module")
def plan(checkpoint: Callable[..., Path]) -> Plan:
    return hmc.compile(checkpoint("deepseek_v3", "fp8"))


def test_round_trip_and_determinism(plan: Plan, tmp_path: Path, checkpoint: Any) -> None:
    save_plan(plan, tmp_path / "a.hmp")
    save_plan(hmc.compile(checkpoint("deepseek_v3", "fp8")), tmp_path / "b.hmp")
    assert (tmp_path / "a.hmp").read_bytes() == (tmp_path / "b.hmp").read_bytes()
    assert load_plan(tmp_path / "a.hmp") == plan


def test_save_leaves_no_half_written_file(plan: Plan, tmp_path: Path) -> None:
    target = tmp_path / "nowhere" / "a.hmp"
    with pytest.raises(PlanError, match="cannot write the plan"):
        save_plan(plan, target)
    assert not list(tmp_path.iterdir())


def test_full_disk_is_one_clear_error(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(PlanError, match="No space left on device"):
        save_plan(plan, tmp_path / "a.hmp")
    assert not list(tmp_path.iterdir())


def _rewrite(path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {entry: archive.read(entry) for entry in archive.namelist()}
    parts[name] = change(parts[name])
    with zipfile.ZipFile(path, "w") as archive:
        for entry, body in parts.items():
            archive.writestr(entry, body)


def test_tampering_is_refused(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "a.hmp"
    save_plan(plan, path)
    _rewrite(path, "plan.json", lambda body: body.replace(b'"top_k":4', b'"top_k":5'))
    with pytest.raises(PlanFormatError, match="was changed after it was made"):
        load_plan(path)


def test_another_schema_version_is_refused(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "a.hmp"
    save_plan(plan, path)

    def older(body: bytes) -> bytes:
        return json.dumps(json.loads(body) | {"schema_version": 0}).encode()

    _rewrite(path, "digest.json", older)
    with pytest.raises(PlanFormatError, match="plan schema 0, this hmc reads 3"):
        load_plan(path)


@pytest.mark.parametrize("content", [b"", b"no zip at all", b"PK\x03\x04 cut short"])
def test_what_is_no_plan_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.hmp"
    path.write_bytes(content)
    with pytest.raises(PlanFormatError, match="is no hmc plan"):
        load_plan(path)


@pytest.mark.parametrize(("entry", "size"), [("plan.json", 65 << 20), ("digest.json", 5 << 10)])
def test_an_entry_that_unpacks_to_much_more_than_a_plan_is_refused(
    plan: Plan, tmp_path: Path, entry: str, size: int
) -> None:
    path = tmp_path / "a.hmp"
    save_plan(plan, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, body in parts.items():
            with archive.open(name, "w") as file:
                file.write(body)
                for _ in range(size >> 10 if name == entry else 0):
                    file.write(bytes(1 << 10))
    assert path.stat().st_size < 4 << 20
    with pytest.raises(PlanFormatError, match=f"its {entry} has .* bytes, more than the"):
        load_plan(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_plan_compressed_otherwise_is_refused(plan: Plan, tmp_path: Path, method: int) -> None:
    path = tmp_path / "a.hmp"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("digest.json", b"{}")
    with pytest.raises(PlanFormatError, match="not deflated"):
        load_plan(path)


@pytest.mark.parametrize(
    ("digest", "body", "message"),
    [
        (b"[" * 2000 + b"]" * 2000, b"{}", "its digest is unreadable"),
        (None, b"[" * 100_000, "recursion limit"),
        (None, b'{"phases":[' + b"0," * (5 << 20) + b"0]}", "values, more than"),
        (None, b'"":' * (1 << 21), "names, more than"),
        (None, b'{"phases":[' + b"0," * (1 << 16) + b"0]}", "Field required"),
    ],
)
def test_a_plan_that_would_take_much_memory_is_refused(
    tmp_path: Path, digest: bytes | None, body: bytes, message: str
) -> None:
    path = tmp_path / "a.hmp"
    hashed = {"schema_version": SCHEMA_VERSION, "sha256": hashlib.sha256(body).hexdigest()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("digest.json", digest or json.dumps(hashed))
        archive.writestr("plan.json", body)
    with pytest.raises(PlanFormatError, match=message):
        load_plan(path)


def test_what_is_wrong_with_every_element_is_one_fault() -> None:
    with pytest.raises(ValidationError) as caught:
        CheckpointInfo.model_validate_json('{"shards": [' + "0," * 9999 + "0]}")
    assert caught.value.error_count() < 9


def test_a_plan_of_a_thousand_million_threads_is_refused(plan: Plan) -> None:
    with pytest.raises(VerifyError, match=r"1000000000 threads: there must be 1\.\."):
        verify_plan(plan.model_copy(update={"threads": 10**9}))


def test_a_damaged_plan_is_refused(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "a.hmp"
    save_plan(plan, path)
    body = bytearray(path.read_bytes())
    body[len(body) // 2] ^= 0xFF
    path.write_bytes(bytes(body))
    with pytest.raises(PlanFormatError):
        load_plan(path)


def test_a_missing_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="No such file"):
        load_plan(tmp_path / "none.hmp")


def test_buffers_in_use_together_never_share_bytes(plan: Plan) -> None:
    sizes = {"f32": 4, "bf16": 2, "i32": 4}
    for phase in plan.phases:
        lives: dict[str, list[int]] = {}
        for position, step in enumerate(phase.steps):
            for operand in (*step.inputs.values(), *step.outputs.values()):
                lives.setdefault(operand.buffer, []).append(position)
        inside = [b for b in phase.buffers if b.offset >= 0]
        for one in inside:
            for two in inside:
                apart = (
                    one.offset + one.width * sizes[one.dtype] <= two.offset
                    or two.offset + two.width * sizes[two.dtype] <= one.offset
                )
                together = lives[one.name][0] <= lives[two.name][-1] and (
                    lives[two.name][0] <= lives[one.name][-1]
                )
                assert one is two or apart or not together


def test_plan_file_is_readable_by_all(plan: Plan, tmp_path: Path) -> None:
    save_plan(plan, tmp_path / "a.hmp")
    assert os.stat(tmp_path / "a.hmp").st_mode & 0o444 == 0o444
