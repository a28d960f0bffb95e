"""GGUF files as checkpoints: their headers (header, files), the names and the configuration that
hmc's families ask for (families, table and a row for each architecture, names), the tokenizer and
the chat template that their metadata hold (vocabulary, splitting).
"""

from hmc.checkpoint.gguf.checkpoint import GgufCheckpoint, open_gguf, settings_of
from hmc.checkpoint.gguf.header import parse_gguf
from hmc.checkpoint.gguf.table import GGUF_FAMILIES
from hmc.checkpoint.gguf.vocabulary import GgufTokenizer, read_tokenizer, sentence_piece

__all__ = [
    "GGUF_FAMILIES",
    "GgufCheckpoint",
    "GgufTokenizer",
    "open_gguf",
    "parse_gguf",
    "read_tokenizer",
    "sentence_piece",
    "settings_of",
]
