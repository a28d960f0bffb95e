"""K-EXAONE: DeepSeek-V3's routing under grouped-query attention with norms of q and k by head; most
layers slide, the others see all tokens and know no positions.
"""

from __future__ import annotations

from torch import nn

from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    attention_heads,
    check_values,
)
from hmc.models.family import LOOKS_AHEAD, Aside, Family, look_ahead
from hmc.models.rope import rope
from hmc.models.routing import dense_mlp, grouped_moe, is_routed
from hmc.models.windows import SLIDING, layer_types, window


def build(config: ModelConfig) -> nn.Module:
    """The model of a K-EXAONE config.json."""
    check_values(config, scoring_func="sigmoid")
    kinds = layer_types(config, "sliding_window_pattern", 4)
    angles = rope(config, attention_heads(config)[2])

    def layer(index: int) -> nn.Module:
        turned = kinds[index] == SLIDING
        attention = GroupedQueryAttention(
            config,
            angles if turned else None,
            qk_norm="head",
            window=window(config, kinds[index]),
        )
        mlp = grouped_moe(config) if is_routed(config, index, first=1) else dense_mlp(config)
        return DecoderLayer(config, attention, mlp)

    return CausalLM(config, layer)


FAMILIES = (
    Family(
        "exaone_moe",
        build,
        "norms of q and k by head, sliding windows, layers without rope, sigmoid routing in groups",
        ("LGAI-EXAONE/K-EXAONE-236B-A23B",),
        names=((r"\.gate\.e_score_correction_bias$", ".e_score_correction_bias"),),
        aside=lambda config: (Aside("mtp.*", LOOKS_AHEAD), *look_ahead(config)),
    ),
)
