"""One machine that is played: its GPUs, and the environment in which a process has them."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

LIBRARIES = ("cudart", "cublas", "cublasLt", "cuda")


@dataclass(frozen=True)
class Played:
    """`gpus` GPUs of a compute capability (`sm`, 10 times major plus minor), `gb` GiB each; with
    `sanitized`, PyTorch's stream sanitizer looks on, and decode is handed over step by step."""

    sm: int
    gb: int
    gpus: int = 1
    sanitized: bool = False

    def __str__(self) -> str:
        several = f"{self.gpus} x " if self.gpus > 1 else ""
        return f"{several}sm_{self.sm}, {self.gb} GB{', sanitized' * self.sanitized}"

    def environment(self, folder: Path, libraries: Path) -> dict[str, str]:
        """This process's, for one with these GPUs. `folder` holds what build.py made, `libraries`
        what came with PyTorch."""
        found = dict(os.environ)
        found.pop("HMC_FAKE_LOG", None)
        paths = [str(folder), str(libraries), *filter(None, [found.get("LD_LIBRARY_PATH", "")])]
        return found | {
            "HMC_FAKE_SM": str(self.sm),
            "HMC_FAKE_GB": str(self.gb),
            "HMC_FAKE_GPUS": str(self.gpus),
            "HMC_FAKE_FOLDER": str(folder),
            "LD_PRELOAD": " ".join(str(library(folder, stem)) for stem in LIBRARIES),
            "LD_LIBRARY_PATH": os.pathsep.join(paths),
            "TRITON_LIBCUDA_PATH": str(folder),
            "TRITON_CACHE_DIR": str(folder / "triton"),  # apart from those of real GPUs
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "PYTHONFAULTHANDLER": "1",
            **({"TORCH_CUDA_SANITIZER": "1", "HMC_GRAPHS": "0"} if self.sanitized else {}),
        }


def here() -> Played:
    """The machine that this process has; `KeyError` where it has none."""
    sm, gb, gpus = (int(os.environ[f"HMC_FAKE_{name}"]) for name in ("SM", "GB", "GPUS"))
    return Played(sm, gb, gpus, os.environ.get("TORCH_CUDA_SANITIZER") == "1")


def library(folder: Path, stem: str) -> Path:
    """A library that was built."""
    (found,) = folder.glob(f"lib{stem}.so.*")
    return found
