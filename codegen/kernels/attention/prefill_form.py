"""Sizes of prefill attention: its form by tier, and where its scratch holds what."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hmc.codegen.kernels.attention.attend_rows import LATENT, Multiplies
from hmc.codegen.kernels.attention.options import reach
from hmc.codegen.panel import tiling
from hmc.codegen.spec import KernelSpec


def lift_form(spec: KernelSpec) -> tiling.Form:
    """How `mla_prefill` multiplies latents by kv_b. Heads that are no whole vectors straddle blocks
    of scales.
    """
    params = dict(spec.params) | {"k": spec["rank"]}
    form = tiling.Form.of(replace(spec, params=tuple(sorted(params.items())), tile=()))
    odd = any(spec[name] % form.lanes for name in ("nope", "v_dim"))
    return replace(form, straddles=odd)


_TILE = 192
"""Most positions of a tile that is a part of a block."""


def _terms(spec: KernelSpec) -> int:
    """Terms that queries enter in, where keys are cached as they are multiplied."""
    return 2 if spec.tier.pair_dot else 1


def _chosen_tile(spec: KernelSpec) -> tuple[int, int]:
    """(positions of a tile, how many are multiplied at once): even divisors, of the block and of
    the tile.
    """

    def most(of: int, limit: int) -> int:
        return max(each for each in range(2, min(of, limit) + 1, 2) if of % each == 0)

    keys = most(spec["index_block"], _TILE)
    return keys, most(keys, spec.tier.token_tile)


def index_form(spec: KernelSpec) -> Form:
    """How `block_prefill` scores positions: all heads share a key, and there are no values."""
    keys, high = _chosen_tile(spec)
    sizes = spec["heads"], 1, spec["dim"], 0, spec["block"]
    return Form(spec.isa, *sizes, _terms(spec), high, keys, rows=256)


@dataclass(frozen=True)
class Form(Multiplies):
    """Sizes of one prefill attention kernel, and where its scratch holds what.

    A panel is `vectors` vectors of query rows, a row being one (token, head); `high` keys or value
    dimensions are multiplied at once; `keys` positions make a tile; a unit has `rows` query rows,
    `bounded` where they do not see all positions before them, `chosen` where they chose blocks of
    them.
    """

    heads: int
    kv_heads: int
    key: int
    value: int
    block: int
    terms: int
    high: int
    keys: int
    rows: int
    bounded: bool = False
    chosen: bool = False
    vectors: int = 2

    @staticmethod
    def of(spec: KernelSpec) -> Form:
        """The form of `attention_prefill`, or of `mla_prefill`, every head with keys and values of
        its own. Units of the latter are long, since each makes its keys anew; a tile has no more of
        them than are lifted at once.
        """
        tier, chosen = spec.tier, spec.get("index_block") > 0
        high = tier.token_tile
        if spec.op in LATENT:
            kv_heads, key = spec["heads"], spec["nope"] + spec["rope"]
            terms, keys, rows = 1, min(192, lift_form(spec).block // high * high), 2048
        else:
            kv_heads, key = spec["kv_heads"], spec["head_dim"]
            terms, keys, rows = _terms(spec), 96, 256
        if chosen:
            keys, high = _chosen_tile(spec)
        sizes = spec["heads"], kv_heads, key, spec["v_dim"], spec["block"]
        return Form(spec.isa, *sizes, terms, high, keys, rows, reach(spec) > 0, chosen)

    @property
    def panel(self) -> int:
        """Query rows of a panel."""
        return self.vectors * self.lanes

    @property
    def group(self) -> int:
        """Heads that share one cache row."""
        return self.heads // self.kv_heads

    @property
    def tokens(self) -> int:
        """Most tokens of a unit."""
        return max(1, self.rows // self.group)

    @property
    def panels(self) -> int:
        """Most panels of a unit."""
        return -(-self.tokens * self.group // self.panel)

    # Scratch, in words of 4 bytes; every part starts on a cache line.

    @property
    def key_words(self) -> int:
        """Words of a packed key."""
        return self.key // self.step

    @property
    def query_steps(self) -> int:
        """Key steps of a term of a packed query, up to whole squares of a transpose."""
        return -(-self.key_words // self.lanes) * self.lanes

    @property
    def query_words(self) -> int:
        """Words of a packed panel of queries, [term][key step][row]."""
        return self.terms * self.query_steps * self.panel

    @property
    def result_words(self) -> int:
        """Words of a panel's results, [dimension][row]."""
        return self.value * self.panel

    @property
    def state_words(self) -> int:
        """Words of a panel's state: positions i32, m, l, and the tile's largest score and rescaling
        factor, [row] each; where rows are bounded the first position that they see, or where they
        chose blocks the last one of the tile, i32.
        """
        return (5 + (self.bounded or self.chosen)) * self.panel

    @property
    def offsets(self) -> dict[str, int]:
        """Byte offsets of queries, results, states, keys, values, weights and what was chosen; and
        their end.
        """
        sizes = {
            "queries": self.panels * self.query_words,
            "results": self.panels * self.result_words,
            "states": self.panels * self.state_words,
            # Queries on their way into panels take this place first.
            "keys": max(self.keys * self.key_words, self.lanes * self.terms * self.query_steps),
            "values": -(-self.keys // self.step) * self.value,
            "weights": self.keys * self.panel,
            "choice": 2 * self.tokens * self.chosen,
        }
        found, at = {}, 0
        for name, words in sizes.items():
            found[name] = at
            at += 4 * words + 63 & ~63
        return found | {"end": at}


def prefill_scratch_bytes(spec: KernelSpec) -> int:
    """Bytes of `scratch` for each worker, best aligned to 64: what its unit takes, and the panels
    that lift keys.
    """
    panels = lift_form(spec).scratch_bytes if spec.op in LATENT else 0
    return panels + Form.of(spec).offsets["end"]
