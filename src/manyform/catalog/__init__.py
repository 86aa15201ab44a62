"""Named architectures, as data: `entry("llama")`, `create("llama", vocab_size=256)`."""

from manyform.catalog.build import create, entry
from manyform.catalog.entries import ENTRIES
from manyform.catalog.entry import Entry


def catalog() -> list[Entry]:
    """Every entry, the oldest first."""
    return sorted(ENTRIES.values(), key=lambda e: (e.year, e.name))


__all__ = ["ENTRIES", "Entry", "catalog", "create", "entry"]
