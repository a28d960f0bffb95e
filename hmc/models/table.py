"""The table of families: a row each, from the file that builds it, and rows that installed packages
add under the entry point group `hmc.families`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from hmc.errors import UnsupportedError
from hmc.models.family import Family

_FILES = """
afmoe axk1 bailing_hybrid cohere2_moe deepseek_v2 deepseek_v3 deepseek_v32 deepseek_v4 ernie4_5_moe
exaone_moe flint gemma4 glm4_moe glm5_next gpt_oss granitemoe granitemoehybrid hunyuan_v1_moe hy_v3
hy_v4 jamba kimi_linear kolibri1 laguna lfm2_moe llama4 mellum mimo_v2_flash minimax_m2 minimax_m3
mistral4 mistral_large4 mixtral nemotron_h olmoe phimoe qwen3_moe qwen3_next sarvam_mla step3p7
""".split()
"""Files beside this one, each with rows of its own in `FAMILIES`."""

GROUP = "hmc.families"
"""Entry points of packages that bring families; each names a `Family` or a tuple of them."""

FAMILIES: dict[str, Family] = {
    row.model_type: row for name in _FILES for row in import_module(f"hmc.models.{name}").FAMILIES
}


def all_families() -> dict[str, Family]:
    """Every family by its model_type, those of installed packages too.

    Raises `UnsupportedError` for a package whose entry point is no family.
    """
    found = dict(FAMILIES)
    for point in entry_points(group=GROUP):
        try:
            rows = point.load()
        except Exception as error:
            raise UnsupportedError(
                f"entry point {point.name} of group {GROUP} cannot be loaded:"
                f" {type(error).__name__}: {error}"
            ) from error
        for row in rows if isinstance(rows, tuple) else (rows,):
            if not isinstance(row, Family):
                raise UnsupportedError(
                    f"entry point {point.name} of group {GROUP}: {row!r} is no hmc.models.Family"
                )
            found.setdefault(row.model_type, row)
    return found
