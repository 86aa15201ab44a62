"""Every family of checkpoints, a record each."""

from manyform.exchange.families import (
    encoders,
    gpt,
    hybrid,
    latent,
    llama,
    minimax,
    parallel,
    recurrent,
    reformer,
    state_space,
    zamba2,
)
from manyform.exchange.family import Family

FAMILIES: dict[str, Family] = {
    f.model_type: f for f in [*llama.FAMILIES, *gpt.FAMILIES, *state_space.FAMILIES,
                              *hybrid.FAMILIES, *recurrent.FAMILIES, *latent.FAMILIES,
                              *parallel.FAMILIES, *encoders.FAMILIES,
                              *minimax.FAMILIES, *zamba2.FAMILIES,
                              *reformer.FAMILIES]}
"""By `model_type`, in the order in which an export tries them."""
