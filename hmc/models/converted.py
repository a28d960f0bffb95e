"""What weights of layers with states mean in files of converters to GGUF, where that is not what is
published.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmc.checkpoint.config import ModelConfig


def converted(config: ModelConfig) -> bool:
    """Whether weights lie as converters to GGUF leave them."""
    section = config.section("quantization_config")
    return section is not None and section.get_str("quant_method", "") == "gguf"


def rates(weight: Tensor, log: bool) -> Tensor:
    """How fast states decay, below 0: the weight or, where it is published as `log`, -exp of it."""
    return -torch.exp(weight) if log else weight
