"""Every sequence architecture since 1986 behind one contract, `y, state = model(x, state)`."""

from manyform import state
from manyform.catalog import catalog, create
from manyform.contract import (
    Cost,
    Hint,
    Mixer,
    Place,
    SequenceMixer,
    channel,
    channels,
    mixer,
    mixers,
)
from manyform.errors import ManyformError
from manyform.model import Model, load

__version__ = "0.1.0"
__all__ = [
    "Cost",
    "Hint",
    "ManyformError",
    "Mixer",
    "Model",
    "Place",
    "SequenceMixer",
    "catalog",
    "channel",
    "channels",
    "create",
    "load",
    "mixer",
    "mixers",
    "state",
]
