"""Checkpoints as Hugging Face lays them out: configuration, shard headers, and where weights lie.

`Checkpoint.open` reads config.json and the headers, never the data; `hmc.checkpoint.mapped` maps
the data and is imported by itself, since only it needs numpy.
"""

from hmc.checkpoint.config import LOSSY_KEY, ModelConfig, load_config
from hmc.checkpoint.headers import ShardInfo, TensorInfo, read_fingerprint, read_header
from hmc.checkpoint.quantization import Note, Quantization, read_quantization
from hmc.checkpoint.source import Part, WeightSource
from hmc.checkpoint.weights import Checkpoint, InventedCheckpoint

__all__ = [
    "LOSSY_KEY",
    "Checkpoint",
    "InventedCheckpoint",
    "ModelConfig",
    "Note",
    "Part",
    "Quantization",
    "ShardInfo",
    "TensorInfo",
    "WeightSource",
    "load_config",
    "read_fingerprint",
    "read_header",
    "read_quantization",
]
