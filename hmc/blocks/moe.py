"""The two halves of a mixture of experts: which experts a token goes to (`Route`), and the experts
themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hmc.blocks.base import Block, parameter, sibling
from hmc.blocks.pointwise import activated
from hmc.checkpoint.views import View
from hmc.codegen.expr import SWIGLU, has_gate, weighs
from hmc.graph import Attr, WeightSpec, attrs
from hmc.ops.routing import EPS


class Scoring(IntEnum):
    """How router logits become scores; the numbers are those of the route kernel's `scoring`
    parameter.
    """

    SOFTMAX_ALL = 0
    SIGMOID = 1
    SOFTMAX_CHOSEN = 2
    SIGMOID_CHOSEN = 3
    SPARSEMIXER = 4
    SQRT_SOFTPLUS = 5


class Route(Block):
    """Router logits [T, experts] -> (ids i32, weights f32), both [T, top_k], best first, ties to
    the lower id.

    With `groups` > 0 only the experts of the `top_groups` best of equal groups may be chosen, a
    group's score being the sum of its `group_best` largest biased scores: two (DeepSeek-V3, arXiv
    2412.19437, section 2.1.2) or one (DeepSeek-V2). The bias, at `bias_name` beside the block in
    the checkpoint, counts for choosing only: it is added to scores, or to logits where weights are
    made of the chosen ones. Weights are then divided by their sum + `eps` if `normalise`, and
    scaled by `factor` and by a scale of each expert, at `scale_name`. `jitter` is SparseMixer's.
    """

    kind = "route"
    dtype = "i32"

    def __init__(
        self,
        experts: int,
        top_k: int,
        scoring: Scoring,
        *,
        normalise: bool,
        groups: int = 0,
        top_groups: int = 0,
        group_best: int = 2,
        factor: float = 1.0,
        eps: float = EPS,
        jitter: float = 0.0,
        bias_name: str | None = None,
        scale_name: str | None = None,
    ) -> None:
        super().__init__()
        self.experts, self.top_k, self.scoring = experts, top_k, int(scoring)
        self.normalise, self.factor, self.eps = int(normalise), factor, eps
        self.groups, self.top_groups, self.group_best = groups, top_groups, group_best
        self.jitter = jitter
        self.names = {"bias": bias_name, "scale": scale_name}
        self.width = top_k
        self.bias = parameter(experts) if bias_name else None
        self.scale = parameter(experts) if scale_name else None

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        return tuple(
            WeightSpec(role, sibling(path, name), (self.experts,))
            for role, name in self.names.items()
            if name
        )

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        found = dict(super().attributes())
        if self.top_groups and self.group_best != 2:
            found["group_best"] = self.group_best
        if self.normalise and self.eps != EPS:
            found["eps"] = self.eps
        if self.scoring == Scoring.SPARSEMIXER:
            found["jitter"] = self.jitter
        return attrs(**found)

    def forward(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = scored(self.scoring, logits)
        choice = scores if self.bias is None else scores + self.bias
        ids = _largest(self._within_groups(choice), self.top_k)
        weights = scores.gather(-1, ids)
        if self.scoring == Scoring.SOFTMAX_CHOSEN:
            weights = weights.softmax(-1)
        elif self.scoring == Scoring.SIGMOID_CHOSEN:
            weights = weights.sigmoid()
        elif self.scoring == Scoring.SPARSEMIXER:
            weights = _mixed(scores, ids, self.jitter)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + self.eps)
        weights = weights * self.factor
        return ids.to(torch.int32), weights if self.scale is None else weights * self.scale[ids]

    def _within_groups(self, choice: Tensor) -> Tensor:
        if not self.groups:
            return choice
        grouped = choice.reshape(len(choice), self.groups, self.experts // self.groups)
        worth = grouped.topk(self.group_best, -1).values.sum(-1)
        open_groups = torch.zeros_like(worth, dtype=torch.bool)
        open_groups.scatter_(-1, _largest(worth, self.top_groups), True)
        return grouped.masked_fill(~open_groups[..., None], float("-inf")).flatten(-2)


class HashRoute(Block):
    """(router logits [T, experts], token ids [T]) -> (ids i32, weights f32), both [T, top_k]: the
    experts that `table` [vocab, top_k], whole numbers at `name` beside the block, has for a token's
    id, weighed by their scores as in `Route`.
    """

    kind = "hash_route"
    dtype = "i32"

    def __init__(
        self,
        experts: int,
        top_k: int,
        scoring: Scoring,
        *,
        vocab: int,
        name: str,
        normalise: bool,
        factor: float = 1.0,
    ) -> None:
        super().__init__()
        self.experts, self.top_k, self.scoring, self.vocab = experts, top_k, int(scoring), vocab
        self.normalise, self.factor, self.name = int(normalise), factor, name
        self.width = top_k
        self.table = parameter(vocab, top_k)

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        shape = self.vocab, self.top_k
        return (WeightSpec("table", sibling(path, self.name), shape, dtype="I64"),)

    def forward(self, logits: Tensor, token: Tensor) -> tuple[Tensor, Tensor]:
        return chosen_by_table(dict(self.attributes()), logits, self.table[token.long()])


def scored(scoring: int, logits: Tensor) -> Tensor:
    """Scores by `Scoring`; those that are made of the chosen ones alone are logits here."""
    if scoring == Scoring.SOFTMAX_ALL:
        return logits.softmax(-1)
    if scoring == Scoring.SQRT_SOFTPLUS:
        return functional.softplus(logits).sqrt()
    return logits.sigmoid() if scoring == Scoring.SIGMOID else logits


def chosen_by_table(
    attrs: Mapping[str, Any], logits: Tensor, experts: Tensor
) -> tuple[Tensor, Tensor]:
    """What `hash_route` gives of logits [T, experts] and the table's rows [T, top_k]."""
    ids = experts.long()
    weights = scored(int(attrs["scoring"]), logits).gather(-1, ids)
    if attrs["normalise"]:
        weights = weights / (weights.sum(-1, keepdim=True) + EPS)
    return ids.to(torch.int32), weights * float(attrs["factor"])


class Experts(Block):
    """Gated MLPs of the chosen experts, summed with their routing weights: x [T, hidden], routing
    -> [T, hidden]; `act` is the expression of `gate` and `up` between their matmuls (without one it
    is SwiGLU, or what the model has). One of `up` alone is that of experts without a gate, which
    have no such matrix. Where it has the token's `weight` for the expert in it (Llama 4 weighs what
    an expert reads), results are summed as they are.

    The parameters are stacked, gate and up [experts, intermediate, hidden], down [experts, hidden,
    intermediate]; the checkpoint holds one tensor an expert, `<path>.<e>.<name>.weight` with the
    three `names`, or for each role `<path>.<tensor>` of `stacked` with all of them. With `bias` all
    have one, gate_bias, up_bias and down_bias; one an expert is at `<name>.bias`.
    """

    kind = "experts"

    def __init__(
        self,
        experts: int,
        hidden: int,
        intermediate: int,
        top_k: int,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        act: str = "",
        stacked: Mapping[str, tuple[str, View]] | None = None,
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.stacked = stacked or {}
        self.experts, self.intermediate, self.top_k = experts, intermediate, top_k
        self.names, self.act = names, act
        self.width = hidden
        gated = has_gate(self._act)
        self.gate = parameter(experts, intermediate, hidden) if gated else None
        self.up = parameter(experts, intermediate, hidden)
        self.down = parameter(experts, hidden, intermediate)
        self.gate_bias = parameter(experts, intermediate) if bias and gated else None
        self.up_bias = parameter(experts, intermediate) if bias else None
        self.down_bias = parameter(experts, hidden) if bias else None

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        into, back = (self.intermediate, self.width), (self.width, self.intermediate)
        found = []
        parts = zip(("gate", "up", "down"), self.names, (into, into, back), strict=True)
        held = [part for part in parts if getattr(self, part[0]) is not None]
        for end in ("", "_bias") if self.up_bias is not None else ("",):
            for role, name, shape in held:
                own = f"{{e}}.{name}.{'bias' if end else 'weight'}"
                tensor, view = self.stacked.get(role + end, (own, None))
                found.append(
                    WeightSpec(
                        role + end,
                        f"{path}.{tensor}",
                        shape[:1] if end else shape,
                        linear=not end,
                        experts=self.experts,
                        view=view,
                    )
                )
        return tuple(found)

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        sizes = {"experts": self.experts, "top_k": self.top_k}
        return attrs(k=self.width, n=self.intermediate, act=self._act, **sizes)

    def forward(self, x: Tensor, routing: tuple[Tensor, Tensor]) -> Tensor:
        ids, weights = routing
        total = torch.zeros_like(x)
        for expert in sorted(set(ids.flatten().tolist())):
            token, slot = torch.where(ids == expert)
            rows = x[token]
            share = weights[token, slot, None]
            gate = None if self.gate is None else self._product(rows, "gate", expert)
            hidden = activated(self._act, gate, self._product(rows, "up", expert), share)
            result = self._product(hidden, "down", expert)
            total.index_add_(0, token, result if weighs(self._act) else result * share)
        return total

    @property
    def _act(self) -> str:
        return self.act or SWIGLU

    def _product(self, x: Tensor, role: str, expert: int) -> Tensor:
        bias = getattr(self, f"{role}_bias")
        matrix = getattr(self, role)[expert]
        return functional.linear(x, matrix, None if bias is None else bias[expert])


def _mixed(scores: Tensor, ids: Tensor, jitter: float) -> Tensor:
    """SparseMixer's weights of `ids`, chosen one after the other."""
    left, found = scores.clone(), []
    for slot in range(ids.shape[1]):
        best = left.amax(-1, keepdim=True)
        far = (best - left) / torch.maximum(scores.abs(), best) > 2 * jitter
        shares = left.masked_fill(far, float("-inf")).softmax(-1)
        own = ids[:, slot : slot + 1]
        found.append(shares.gather(-1, own))
        left = left.scatter(-1, own, float("-inf"))
    return torch.cat(found, -1)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of each row, best first; of equals the lower index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :count]
