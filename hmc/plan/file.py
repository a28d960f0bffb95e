"""The .hmp file: a zip of canonical JSON and its digest; hides the container.

    plan.json     the plan, keys sorted, no white space
    digest.json   {"format": "hmc-plan", "schema_version": N, "sha256": hash of plan.json}

Same plan, same bytes: entries carry a fixed date and one compression level. Saving writes beside
the target and renames.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from pathlib import Path

from pydantic import ValidationError

from hmc import env
from hmc.errors import PlanError, PlanFormatError
from hmc.files import write_file
from hmc.plan.model import SCHEMA_VERSION, Plan

_EPOCH = (1980, 1, 1, 0, 0, 0)
_DIGEST_BYTES, _PLAN_BYTES = 4 << 10, 64 << 20
_MOST = {"values": (b",", 4 << 20), "names": (b'":', 1 << 20)}
"""What the entries may unpack to, in bytes and in parts, which take more memory: the plan of 671e9
parameters has 3.5 MB, 0.23 million values and 0.18 million names.
"""


def canonical_json(plan: Plan) -> str:
    """The plan as JSON with sorted keys, without white space and without fields left at their
    defaults.
    """
    return json.dumps(
        plan.model_dump(mode="json", exclude_defaults=True) | {"schema_version": SCHEMA_VERSION},
        sort_keys=True,
        separators=(",", ":"),
        allow_nan=False,
    )


def save(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write `plan` to `path` (.hmp); `PlanError` when the file cannot be written
    whole.
    """
    with env.uncollected():
        text = canonical_json(plan)
    if env.debug_level() >= 4:
        env.debug(4, text)
    env.dump("plan.json", text)
    digest = {
        "format": "hmc-plan",
        "schema_version": SCHEMA_VERSION,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    target = Path(path)
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for entry, content in (
            ("digest.json", json.dumps(digest, sort_keys=True)),
            ("plan.json", text),
        ):
            info = zipfile.ZipInfo(entry, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o644 << 16
            archive.writestr(info, content, compresslevel=9)
    write_file(target, body.getvalue(), "the plan", PlanError)


def load(path: str | os.PathLike[str]) -> Plan:
    """Read a plan; `PlanFormatError` names what is wrong with the file."""
    source = Path(path)
    try:
        with zipfile.ZipFile(source) as archive:
            digest_text = _read(archive, source, "digest.json", _DIGEST_BYTES)
            text = _read(archive, source, "plan.json", _PLAN_BYTES)
    except OSError as error:
        raise PlanError(f"cannot read the plan {source}: {error.strerror or error}") from error
    except KeyError as error:
        raise PlanFormatError(f"{source} is no hmc plan: {error.args[0]}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise PlanFormatError(f"{source} is no hmc plan, or is damaged: {error}") from error
    try:
        digest = json.loads(digest_text)
        version, expected = digest["schema_version"], digest["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PlanFormatError(f"{source} is no hmc plan: its digest is unreadable") from error
    if version != SCHEMA_VERSION:
        raise PlanFormatError(
            f"{source} has plan schema {version}, this hmc reads {SCHEMA_VERSION}:"
            " compile the model again"
        )
    if hashlib.sha256(text).hexdigest() != expected:
        raise PlanFormatError(
            f"{source} was changed after it was made (its digest differs): compile the model again"
        )
    for what, (mark, most) in _MOST.items():
        if (found := text.count(mark)) > most:
            raise PlanFormatError(
                f"{source} is no hmc plan: it has {found:,} {what}, more than the {most:,} that one"
                " may have"
            )
    with env.uncollected():
        try:
            plan = Plan.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"])) or "plan.json"
            raise PlanFormatError(f"{source}: {where}: {first['msg']}") from error
    return plan


def _read(archive: zipfile.ZipFile, source: Path, entry: str, limit: int) -> bytes:
    """An entry, stored as `save` stores it, of at most `limit` bytes."""
    info = archive.getinfo(entry)
    encrypted = info.flag_bits & 1
    if encrypted or info.compress_type not in (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED):
        raise PlanFormatError(f"{source} is no hmc plan: its {entry} is encrypted or not deflated")
    if info.file_size > limit:
        raise PlanFormatError(
            f"{source} is no hmc plan: its {entry} has {info.file_size:,} bytes, more than the"
            f" {limit:,} that one may have"
        )
    return archive.read(info)  # no more than the size it names, or it is damaged
