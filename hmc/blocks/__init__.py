"""The blocks that every model file is built of: torch modules that the tracer keeps whole, one a
node kind.

Each has a `forward` in float32 over a whole prompt (x is [T, width], attention is causal over the T
tokens, no cache), so that a model and every rewritten graph of it can be run as a slow, exact
reference; and each says of itself what passes need to know (`Block`). Roles of weights are the
names of the block's parameters, so a reference loader needs no table: `getattr(block, spec.role)`.
"""

from hmc.blocks.attention import MLA, Attention, Growth, PositionScale, Rotary
from hmc.blocks.base import Block, Columns, Names, place, place_of, publish
from hmc.blocks.block_sparse import IndexBlocks, SparseAttention
from hmc.blocks.compressed import CompressedAttention, Compression, RowIndex
from hmc.blocks.dense import (
    MLP,
    AddNorm,
    Embedding,
    GatedMLP,
    GateUp,
    GroupedLinear,
    Linear,
    RMSNorm,
)
from hmc.blocks.hyper import HyperCopy, HyperIn, HyperOut, HyperWeights
from hmc.blocks.moe import Experts, HashRoute, Route, Scoring
from hmc.blocks.pointwise import Pointwise, Vector, activated
from hmc.blocks.pools import IndexPools
from hmc.blocks.recurrent import Conv, LinearAttention, SelectiveScan
from hmc.blocks.sparse import Index, SparseMLA

__all__ = [
    "MLA",
    "MLP",
    "AddNorm",
    "Attention",
    "Block",
    "Columns",
    "CompressedAttention",
    "Compression",
    "Conv",
    "Embedding",
    "Experts",
    "GateUp",
    "GatedMLP",
    "GroupedLinear",
    "Growth",
    "HashRoute",
    "HyperCopy",
    "HyperIn",
    "HyperOut",
    "HyperWeights",
    "Index",
    "IndexBlocks",
    "IndexPools",
    "Linear",
    "LinearAttention",
    "Names",
    "Pointwise",
    "PositionScale",
    "RMSNorm",
    "Rotary",
    "Route",
    "RowIndex",
    "Scoring",
    "SelectiveScan",
    "SparseAttention",
    "SparseMLA",
    "Vector",
    "activated",
    "place",
    "place_of",
    "publish",
]
