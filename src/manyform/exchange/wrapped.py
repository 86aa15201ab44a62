"""Exports of models that no class of `transformers` represents: ours, shipped with the folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyform.config import ModelConfig
from manyform.errors import ManyformError
from manyform.exchange.family import Family
from manyform.exchange.tensors import Layout, Place
from manyform.model import Model

CODE = '''"""A model of manyform in transformers: from_pretrained(DIR, trust_remote_code=True).

Needs `pip install manyform`, which holds the classes.
"""

from manyform.exchange.hub import ManyformConfig, ManyformForCausalLM

__all__ = ["ManyformConfig", "ManyformForCausalLM"]
'''


class Own(Family):
    """The family of all models here: config.json holds our configuration, and parameters, and the
    buffers that are saved, keep our names."""

    def read_config(self, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        own = values.get("manyform")
        if not isinstance(own, Mapping):
            raise ManyformError(f"{where} of a manyform model needs its key 'manyform', the "
                                "model's configuration")
        return ModelConfig.from_dict(own)

    def places(self, model: Model) -> list[Place]:
        return [Place((name,), (f"model.{name}",), Layout((name,)), None)
                for name in model.state_dict()
                if not (model.config.tie and name == "head.weight")]


OWN = Own("manyform", "ManyformForCausalLM", (),
          {"embedding": "model.embedding", "head": "model.head"}, {}, prefix="")


def wrap(model: Model, folder: Path) -> dict[str, Any]:
    """Write the modeling file into `folder`; the config.json."""
    if not model.causal:
        raise ManyformError(f"{model.config.name or 'this model'} looks ahead, and no family of "
                            "transformers represents it; only causal models are exported with a "
                            "class of their own")
    (folder / "modeling_manyform.py").write_text(CODE, encoding="utf-8")
    config = model.config
    return {
        "architectures": [OWN.architecture], "model_type": OWN.model_type,
        "auto_map": {"AutoConfig": "modeling_manyform.ManyformConfig",
                     "AutoModelForCausalLM": "modeling_manyform.ManyformForCausalLM"},
        "vocab_size": config.vocab_size, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers, "tie_word_embeddings": config.tie,
        "manyform": config.to_dict()}
