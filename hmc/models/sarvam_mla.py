"""Sarvam-105B: DeepSeek-V3's layers, with a rope_type and keys of its own."""

from __future__ import annotations

from hmc.models.deepseek_v3 import latent_model
from hmc.models.family import Family

FAMILIES = (
    Family(
        "sarvam_mla",
        latent_model,
        "latent attention, sigmoid routing, shared experts",
        ("sarvamai/sarvam-105b",),
    ),
)
