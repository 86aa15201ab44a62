"""Optimizers that read what each layer's paper asks for (`manyform.contract.Hint`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyform.contract import param_hints
from manyform.errors import ManyformError
from manyform.training.config import TrainConfig

# Below this many rows or columns a 2-D parameter is a kernel or a per-channel table, not a map
# between features, and orthogonalising it has no meaning.
_NARROW = 16


def param_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Parameters grouped by what they need, in a fixed order.

    Each group holds `params`, their `names`, `kind` ("adamw" or "muon"), `weight_decay`,
    `lr_scale` (from the layers' hints) and `lr` (peak). With optimizer "muon" the 2-D parameters
    inside the blocks that are decayed and at least 16 wide both ways go to Muon; embeddings, the
    head, vectors and everything that a hint keeps from decay go to AdamW.
    """
    hints = param_hints(model)
    groups: dict[tuple[str, bool, float], dict[str, Any]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        hint = hints[name]
        matrix = (p.ndim == 2 and min(p.shape) >= _NARROW and hint.weight_decay
                  and name.startswith("blocks.") and not p.is_complex())
        kind = "muon" if config.optimizer == "muon" and matrix else "adamw"
        key = (kind, hint.weight_decay, hint.lr_scale)
        group = groups.setdefault(key, {
            "params": [], "names": [], "kind": kind, "lr_scale": hint.lr_scale,
            "weight_decay": config.weight_decay if hint.weight_decay else 0.0,
            "lr": config.lr * hint.lr_scale})
        group["params"].append(p)
        group["names"].append(name)
    if not groups:
        raise ManyformError("the model has no parameters to train")
    return list(groups.values())


class Optimizer:
    """One step for all groups; its state goes by parameter name, so that it outlives the process.

    AdamW (Loshchilov & Hutter 2019), fused; Muon (Jordan 2024) with the update size of Liu 2025,
    eq. 4, which lets one learning rate and weight decay serve both.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        groups = param_groups(model, config)
        self.params: list[nn.Parameter] = [p for g in groups for p in g["params"]]
        self._parts: list[torch.optim.Optimizer] = []
        adamw = [g for g in groups if g["kind"] == "adamw"]
        muon = [g for g in groups if g["kind"] == "muon"]
        if adamw:
            fused = not any(p.is_complex() for g in adamw for p in g["params"])
            self._parts.append(torch.optim.AdamW(adamw, lr=config.lr, betas=config.betas,
                                                 eps=config.eps, fused=fused))
        if muon:
            self._parts.append(torch.optim.Muon(muon, lr=config.lr, momentum=config.momentum,
                                                adjust_lr_fn="match_rms_adamw"))
        self._lr = config.lr

    def step(self, lr: float) -> None:
        """Apply the gradients at learning rate `lr` (times each group's lr_scale)."""
        if lr != self._lr:
            for group in self.groups:
                group["lr"] = lr * group["lr_scale"]
            self._lr = lr
        for part in self._parts:
            part.step()

    @property
    def groups(self) -> list[dict[str, Any]]:
        """The groups of `param_groups` as the optimizers hold them."""
        return [g for part in self._parts for g in part.param_groups]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.params:
            p.grad = None

    def gradients(self) -> list[Tensor]:
        """The gradients that the last backward pass left."""
        return [p.grad for p in self.params if p.grad is not None]

    def state_dict(self) -> dict[str, dict[str, Tensor]]:
        """What the optimizers remember: {parameter name: {key: tensor}}; not copied."""
        return {name: dict(part.state[p]) for part in self._parts for group in part.param_groups
                for name, p in zip(group["names"], group["params"], strict=True)
                if p in part.state}

    def load_state_dict(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Put back what `state_dict` gave; ManyformError where a name is not of this model."""
        known = set()
        for part in self._parts:
            part.state.clear()
            for group in part.param_groups:
                for name, p in zip(group["names"], group["params"], strict=True):
                    known.add(name)
                    if name in state:
                        part.state[p] = {
                            key: value.to(value.device if key == "step" and p.device.type == "cpu"
                                          else p.device, copy=True)
                            for key, value in state[name].items()}
        for name in state:
            if name not in known:
                raise ManyformError(f"the optimizer state holds {name!r}, which is not a parameter "
                                    "of this model")
