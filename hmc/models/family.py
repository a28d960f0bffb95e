"""What a row of the table of families holds, and what several of them say alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from hmc.blocks import Names
from hmc.checkpoint.config import ModelConfig

W123: Names = (
    (r"\.\{e\}\.gate_proj\.", ".{e}.w1."),
    (r"\.\{e\}\.up_proj\.", ".{e}.w3."),
    (r"\.\{e\}\.down_proj\.", ".{e}.w2."),
)
"""Experts whose matrices are called as in Mixtral."""


LANGUAGE_MODEL: Names = ((r"^model\.", "model.language_model."),)
"""A language model beside a vision tower, as most published models with images have it."""


@dataclass(frozen=True)
class Aside:
    """Tensors of a checkpoint that hmc does not read, by a shell pattern of their published names,
    and why not.
    """

    pattern: str
    reason: str


@dataclass(frozen=True)
class Limit:
    """The longest context in which what `Family.build` makes is the model, and why no more. Where
    the model of longer ones is another, `longer` builds it, and `beyond` says what differs.
    """

    tokens: int
    reason: str
    longer: Callable[[ModelConfig], nn.Module] | None = None
    beyond: str = ""


@dataclass(frozen=True)
class Family:
    """A family: the `model_type` of its config.json, and how to build the model of one.

    `build` gets the text model's part of the configuration (`ModelConfig.text`). Its modules may be
    called what is convenient: `names` turns the names that follow from them into published ones.
    `aside` lists tensors that checkpoints hold and hmc does not read, `limit` says how long a
    context may be where it is shorter than the configuration's. `needs` and `published` are for
    `hmc models`: the parts beyond grouped-query attention, softmax routing and gated SiLU experts,
    and models of the family.
    """

    model_type: str
    build: Callable[[ModelConfig], nn.Module]
    needs: str = ""
    published: tuple[str, ...] = ()
    names: Names = ()
    aside: Callable[[ModelConfig], tuple[Aside, ...]] = lambda config: ()
    limit: Callable[[ModelConfig], Limit | None] = lambda config: None


LOOKS_AHEAD = "predicts tokens further ahead"
NO_IMAGES = "images are not read"


def look_ahead(config: ModelConfig) -> tuple[Aside, ...]:
    """The layers after the last, which predict tokens further ahead."""
    keys = ("num_nextn_predict_layers", "num_mtp_layers")
    extra = next((config.get_int(key, 0) for key in keys if key in config), 0)
    return tuple(Aside(f"*.layers.{config.depth + index}.*", LOOKS_AHEAD) for index in range(extra))
