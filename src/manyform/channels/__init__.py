"""Channel mixers: what happens to each position's features between two sequence mixers."""

from manyform.channels.mlp import MLP, GatedMLP

__all__ = ["MLP", "GatedMLP"]
