"""Channel mixers: what happens to each position's features between two sequence mixers."""

from manyform.channels.mlp import MLP, GatedMLP
from manyform.channels.rwkv import RWKVChannel

__all__ = ["MLP", "GatedMLP", "RWKVChannel"]
