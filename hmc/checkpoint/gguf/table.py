"""The table of architectures that GGUF files are read of: a row each, from the file that has it."""

from __future__ import annotations

from collections.abc import Mapping

from hmc.checkpoint.gguf.afmoe import AFMOE
from hmc.checkpoint.gguf.bailingmoe2 import BAILING_MOE2
from hmc.checkpoint.gguf.cohere2moe import COHERE2_MOE
from hmc.checkpoint.gguf.deepseek2 import DEEPSEEK2, DEEPSEEK32, GLM_DSA, MISTRAL4
from hmc.checkpoint.gguf.ernie import ERNIE_4_5_MOE
from hmc.checkpoint.gguf.exaone import EXAONE_MOE
from hmc.checkpoint.gguf.families import GgufFamily
from hmc.checkpoint.gguf.gemma4 import GEMMA4
from hmc.checkpoint.gguf.glm4moe import DOTS1, GLM4_MOE
from hmc.checkpoint.gguf.gptoss import GPT_OSS
from hmc.checkpoint.gguf.granitehybrid import GRANITE_HYBRID
from hmc.checkpoint.gguf.granitemoe import GRANITE_MOE
from hmc.checkpoint.gguf.hunyuan import HUNYUAN_MOE
from hmc.checkpoint.gguf.hyv3 import HY_V3
from hmc.checkpoint.gguf.jamba import JAMBA
from hmc.checkpoint.gguf.kimilinear import KIMI_LINEAR
from hmc.checkpoint.gguf.laguna import LAGUNA
from hmc.checkpoint.gguf.lfm2moe import LFM2_MOE
from hmc.checkpoint.gguf.llama import LLAMA
from hmc.checkpoint.gguf.llama4 import LLAMA4
from hmc.checkpoint.gguf.mellum import MELLUM
from hmc.checkpoint.gguf.mimo2 import MIMO2
from hmc.checkpoint.gguf.minimaxm2 import MINIMAX_M2
from hmc.checkpoint.gguf.nemotron import NEMOTRON_H_MOE
from hmc.checkpoint.gguf.olmoe import OLMOE
from hmc.checkpoint.gguf.phimoe import PHIMOE
from hmc.checkpoint.gguf.qwen2moe import QWEN2_MOE
from hmc.checkpoint.gguf.qwen3moe import QWEN3_MOE
from hmc.checkpoint.gguf.qwen3next import QWEN3_NEXT, QWEN35_MOE
from hmc.checkpoint.gguf.step35 import STEP35

GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    "afmoe": AFMOE,
    "bailingmoe2": BAILING_MOE2,
    "cohere2_moe": COHERE2_MOE,  # as ik_llama.cpp calls it
    "cohere2moe": COHERE2_MOE,
    "deepseek2": DEEPSEEK2,
    "deepseek32": DEEPSEEK32,
    "dots1": DOTS1,
    "ernie4_5-moe": ERNIE_4_5_MOE,
    "exaone-moe": EXAONE_MOE,
    "gemma4": GEMMA4,
    "glm-dsa": GLM_DSA,
    "glm4moe": GLM4_MOE,
    "gpt-oss": GPT_OSS,
    "granitehybrid": GRANITE_HYBRID,
    "granitemoe": GRANITE_MOE,
    "hunyuan-moe": HUNYUAN_MOE,
    "hy_v3": HY_V3,
    "jamba": JAMBA,
    "kimi-linear": KIMI_LINEAR,
    "laguna": LAGUNA,
    "lfm2moe": LFM2_MOE,
    "llama": LLAMA,
    "llama4": LLAMA4,
    "mellum": MELLUM,
    "mimo2": MIMO2,
    "minimax-m2": MINIMAX_M2,
    "mistral4": MISTRAL4,
    "nemotron_h_moe": NEMOTRON_H_MOE,
    "olmoe": OLMOE,
    "phimoe": PHIMOE,
    "qwen2moe": QWEN2_MOE,
    "qwen35moe": QWEN35_MOE,
    "qwen3moe": QWEN3_MOE,
    "qwen3next": QWEN3_NEXT,
    "qwen3vlmoe": QWEN3_MOE,  # of text alone, which has no more than one position a token
    "step35": STEP35,
}
"""Rows by `general.architecture`."""
