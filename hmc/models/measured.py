"""What was measured of each family, as `tests/models/measure.py` wrote it into measured.json beside
this file: how near logits come, how fast a layer is, and where and when that was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hmc.checkpoint.gguf import GGUF_FAMILIES
from hmc.checkpoint.jsonfile import parse_object, read_bytes
from hmc.errors import ConfigError
from hmc.models.family import Family

PATH = Path(__file__).with_suffix(".json")

HEAD = """# Models

Families by the `model_type` of config.json, printed by `hmc models --markdown`; `hmc models` lists
those that installed packages add, too. Weights of any family may lie in any format of
[formats.md](formats.md).

* **needs**: what a family has beyond grouped-query attention, softmax routing and gated SiLU
  experts.
* **formats**: of experts in the published configurations that `tests/models/published` has; these
  give the numbers of parameters that their publishers state.
* **parity**: relative error of the logits of tiny models of the family against transformers in
  FP32, the median over the tokens of three seeds: of hmc's kernels (of prefill or decode, whichever
  is larger), against that of transformers in BF16.
* **decode, prefill**: published shapes with random weights, cut to the first layers up to a routed
  one, with fewer experts where memory is short. Of decode the share of the streaming read that the
  weights a step reads make, of a prompt of 512 tokens the share of the multiply-add peak that its
  matmuls make, as `hmc bench` measures both. The output layer is much of so few layers.

"""
COLUMNS = (
    "family",
    "published models",
    "needs",
    "formats",
    "parity",
    "speed measured with",
    "decode",
    "prefill",
)
EMPTY = "-"
_WITHOUT_GGUF = ("axk1", "flex_olmo", "flint", "kolibri1", "sarvam_mla")
"""Families that llama.cpp's converter did not know when its rows were written."""


class Measured(NamedTuple):
    """Of one family, as phrases; `EMPTY` what was not measured."""

    formats: str = EMPTY
    parity: str = EMPTY
    shape: str = EMPTY
    decode: str = EMPTY
    prefill: str = EMPTY


def measured(path: Path = PATH) -> tuple[dict[str, Measured], list[str]]:
    """By family; and sentences about where and when that was measured."""
    values = parse_object(read_bytes(path, ConfigError), str(path), ConfigError)
    formats, parity, speed = (values.get(key, {}) for key in ("formats", "parity", "speed"))
    found = {}
    for name in {*formats, *parity.get("families", ()), *speed.get("families", ())}:
        row = Measured(formats=", ".join(formats.get(name, (EMPTY,))))
        if (near := parity.get("families", {}).get(name)) is not None:
            row = row._replace(parity=f"{near['hmc']:.2%} against {near['bf16']:.2%}")
        if (fast := speed.get("families", {}).get(name)) is not None:
            row = row._replace(
                shape=fast["shape"],
                decode=f"{fast['mbu']:.2f} ({fast['decode']:.0f} tokens/s)",
                prefill=f"{fast['peak_share']:.2f} ({fast['prefill']:.0f} tokens/s)",
            )
        found[name] = row
    about = [
        f"{what.capitalize()}: {part['date']}, {part['machine']}."
        for what, part in (("parity", parity), ("speed", speed))
        if part
    ]
    return found, about


def _gguf() -> str:
    names = ", ".join(f"`{name}`" for name in sorted(GGUF_FAMILIES))
    others = ", ".join(f"`{name}`" for name in _WITHOUT_GGUF)
    return (
        f"GGUF files are read of these architectures (`general.architecture`): {names}."
        f" No row stands for {others}, which llama.cpp's releases did not convert."
    )


def markdown(families: Sequence[Family]) -> Iterator[str]:
    """docs/models.md, line by line."""
    found, about = measured()
    yield f"{HEAD}{_gguf()}\n"
    if about:
        yield " ".join(about) + "\n"
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * len(COLUMNS)}"
    for row in families:
        published = ", ".join(row.published) or EMPTY
        own = found.get(row.model_type, Measured())
        yield f"| {' | '.join((row.model_type, published, row.needs or EMPTY, *own))} |"
