"""Hub ids: what is one, and what looks like a file instead."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from hmc.checkpoint.location import model_name

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)"
    r"(@(?P<revision>[\w.-][\w./-]*))?"
    r"(:(?P<file>[^:\\]+\.gguf))?",
    re.ASCII,
)
_FILES = frozenset(
    ".bin .ckpt .gguf .hmp .jinja .json .jsonl .onnx .pt .pth .safetensors .txt .zip".split()
)
"""Ends of names of files, which no model is asked for by."""


def is_inside(path: str) -> bool:
    """Whether a path with `/` between its parts stays in the folder that it is a path of."""
    parts = path.split("/")
    return path.isprintable() and "\\" not in path and not {"", ".", ".."} & set(parts)


@dataclass(frozen=True)
class HubName:
    """A model of the hub: `repo` is org/name, `revision` a branch, a tag or a commit ("": the main
    branch), `file` a GGUF file in it ("": its safetensors, or the only GGUF file).
    """

    repo: str
    revision: str = ""
    file: str = ""

    @staticmethod
    def parse(argument: str) -> HubName | None:
        """The model that an argument names; None for what is no hub id, such as a path or a file's
        name.
        """
        match = _ID.fullmatch(argument)
        if match is None or PurePosixPath(match["repo"]).suffix.lower() in _FILES:
            return None
        repo, revision, file = (match[part] or "" for part in ("repo", "revision", "file"))
        if not all(is_inside(part) for part in (repo, revision, file) if part):
            return None
        return HubName(repo, revision, file)

    @property
    def model(self) -> str:
        """What the model is called: by its file, or by its name without the organisation."""
        return model_name(Path(self.file or self.repo))

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo}{revision}{f':{self.file}' if self.file else ''}"
