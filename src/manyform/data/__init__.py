"""From any text to batches in an exact order: `manyform.data.load`."""

from manyform.data.dataset import Dataset, load, open_dataset
from manyform.data.loader import IGNORE, Batch, Batches, Streams, Validation
from manyform.data.sources import Source, open_source
from manyform.data.store import cache_folder
from manyform.data.tokenizers import StreamDecoder, Tokenizer, load_tokenizer

__all__ = [
    "IGNORE",
    "Batch",
    "Batches",
    "Dataset",
    "Source",
    "StreamDecoder",
    "Streams",
    "Tokenizer",
    "Validation",
    "cache_folder",
    "load",
    "load_tokenizer",
    "open_dataset",
    "open_source",
]
