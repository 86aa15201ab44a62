"""The contract: `y, state = mixer(x, state, reset=...)`, the same for every architecture."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from manyform.errors import ManyformError, unknown
from manyform.state import State

StateGrowth = Literal["none", "constant", "window", "linear"]
CostGrowth = Literal["linear", "T log T", "T log^2 T", "T sqrt T", "quadratic"]
STATE_ORDER = get_args(StateGrowth)
COST_ORDER = get_args(CostGrowth)


@dataclass(frozen=True)
class Cost:
    """What one sequence costs.

    flops: forward floating-point operations for `length` tokens from the start of a sequence
      (a multiply-add is two; matrix products, convolutions and recurrences, not pointwise work).
    state_bytes: bytes of the state after `length` tokens, one row.
    """

    flops: int
    state_bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.state_bytes + other.state_bytes)


@dataclass(frozen=True)
class Place:
    """Where a layer stands in its stack; initialisations that depend on depth read it.

    uses: how many layers of the stack share its weights.
    """

    index: int = 0
    count: int = 1
    uses: int = 1


@dataclass(frozen=True)
class Hint:
    """What a parameter's paper asks of the optimizer.

    weight_decay: False keeps decay off it. lr_scale: multiplies the learning rate.
    """

    weight_decay: bool = True
    lr_scale: float = 1.0


class Mixer(nn.Module):
    """What sequence mixers and channel mixers share: a state, a cost, hints for the optimizer.

    Subclasses take `d_model` and keyword-only options, `place` among them.
    """

    causal: bool = True
    """False where an output depends on later inputs (an option may set it on the instance): such
    a mixer takes no state and returns None for one."""
    exact_cost: bool = True
    """False where the work depends on the data (learned chunks, routed tokens): `cost` is then what
    is expected, and `cost_limit` what it cannot exceed."""
    discrete: bool = False
    """True where the data choose (a route, a chunk, a depth): a model in bfloat16, whose layers
    round differently from cut to cut, may then choose differently."""
    packs: bool = True
    """False where documents cannot share a row (a Fourier transform over the sequence): such a
    mixer refuses `reset`."""
    shares: ClassVar[bool] = False
    """True if forward also takes `shared=`: a dict that lives for one pass through a stack, for
    the few architectures in which a layer reads what an earlier one computed, what entered the
    stack (`entrance`), which of its uses this is (`use`, from 0, where layers share its weights),
    the `tokens` themselves (int64, if the stack is a model's), or adds to the loss (`add_loss`).
    """

    def __init__(self, d_model: int, *, place: Place = Place()) -> None:
        super().__init__()
        if d_model < 1:
            raise ManyformError(f"d_model must be at least 1, not {d_model}")
        self.d_model = d_model
        self.place = place

    def forward(self, x: Tensor, state: State = None, *, reset: Tensor | None = None,
                ) -> tuple[Tensor, State]:
        """x: (batch, length, d_model) -> y of the same shape, and the state after the last step.

        state: what an earlier call returned, or None at the start of a sequence. It is never
          changed in place where the caller can see it.
        reset: (batch, length) bool, true where a new document begins.
        """
        raise TypeError(f"{type(self).__name__} must define forward")

    def initial_state(self, batch_size: int, *, device: torch.device | str | None = None) -> State:
        """The state before the first token: what `state=None` means."""
        raise TypeError(f"{type(self).__name__} must define initial_state")

    def cost(self, length: int) -> Cost:
        """Declared cost of `length` tokens of one sequence, checked against counted cost."""
        raise TypeError(f"{type(self).__name__} must define cost")

    def cost_limit(self, length: int) -> Cost:
        """The most that `length` tokens of one sequence can cost; `cost` itself where that is
        exact."""
        return self.cost(length)

    def hints(self) -> Mapping[str, Hint]:
        """Hints by parameter name (relative to this module). One-dimensional parameters have no
        weight decay unless a hint says otherwise."""
        return {}

    def deepnorm_weights(self) -> tuple[list[Tensor], list[Tensor]]:
        """For residual="deepnorm": the weights (or views of them) on the way of values to the
        output, whose initial values it scales, and the other matrices (queries, keys, gates).
        Raises ManyformError where the mixer does not tell them apart."""
        raise ManyformError(f"residual='deepnorm' scales the initial weights on the way of values, "
                            f"and {type(self).__name__} does not say which they are "
                            "(deepnorm_weights); use another residual")

    def whole(self, state: State, reset: Tensor | None = None) -> None:
        """For a mixer that must see a whole sequence at once: refuse a state, and `reset` where
        it does not pack. Raises ManyformError."""
        name = type(self).__name__
        if state is not None:
            raise ManyformError(f"{name} looks ahead and cannot continue from a state; give it "
                                "the whole sequence in one call, without a state")
        if reset is not None and not self.packs:
            raise ManyformError(f"{name} mixes the whole row and cannot keep documents apart; "
                                "give each document a row of its own, without reset")

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The keyword options of the constructor, with their defaults."""
        signature = inspect.signature(cls.__init__)
        return {p.name: p.default for p in signature.parameters.values()
                if p.kind is p.KEYWORD_ONLY and p.name != "place"}


class SequenceMixer(Mixer):
    """Mixes information along the sequence; every architecture is one of these plus channels.

    name: registry name. state_growth, cost_growth: how state bytes and operations grow with the
    length of the sequence.
    """

    name: ClassVar[str] = ""
    state_growth: ClassVar[StateGrowth] = "constant"
    cost_growth: ClassVar[CostGrowth] = "linear"
    bare: ClassVar[bool] = False
    """True for a mixer made of blocks, which brings norms and a residual stream of its own: its
    block gives it the stream and takes the new one."""
    aligned: bool = False
    """True if a growing state keeps the newest last and counts its own length, so that zeros may be
    put before it: rows of different lengths can then be joined."""
    reads_tokens: bool = False
    """True if it looks at the tokens themselves (`shared["tokens"]`): it cannot run over some of a
    row's tokens only, or over vectors that are none."""
    exactly_causal: bool = True
    """False where a fast Fourier transform mixes rounding errors (not values) across time."""

    @property
    def growth(self) -> tuple[StateGrowth, CostGrowth]:
        """Growth of this instance's state and cost (an option such as a window can change it)."""
        return self.state_growth, self.cost_growth


_mixers: dict[str, type[SequenceMixer]] = {}
_channels: dict[str, type[Mixer]] = {}


def mixer(name: str) -> Any:
    """Class decorator: register a sequence mixer under a name."""
    def register(cls: type[SequenceMixer]) -> type[SequenceMixer]:
        cls.name = name
        _mixers[name] = cls
        return cls
    return register


def channel(name: str) -> Any:
    """Class decorator: register a channel mixer under a name."""
    def register(cls: type[Mixer]) -> type[Mixer]:
        _channels[name] = cls
        return cls
    return register


def mixers() -> dict[str, type[SequenceMixer]]:
    """Every registered sequence mixer, by name."""
    import manyform.mixers
    import manyform.structures  # noqa: F401  (both register the built-in ones)
    return dict(_mixers)


def channels() -> dict[str, type[Mixer]]:
    """Every registered channel mixer, by name."""
    import manyform.channels  # noqa: F401
    return dict(_channels)


def add_loss(shared: dict[str, Any], name: str, value: Tensor) -> None:
    """Add a term to what training minimises beside the cross-entropy: a scalar, weighted already
    (a mixer's option says how). Terms of one name from several layers are summed."""
    terms = shared.setdefault("losses", {})
    terms[name] = terms[name] + value if name in terms else value


def losses(shared: Mapping[str, Any]) -> dict[str, Tensor]:
    """The terms that layers added in one pass, by name."""
    return shared.get("losses", {})


USER_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
"""What names a class of the user's own: "module:Class"."""


def resolve(kind: str, name: str) -> type[Mixer]:
    """The class of a registered mixer ("mixer") or channel ("channel"), or of "module:Class".

    Raises ManyformError where it is unknown, cannot be imported, or is not a mixer.
    """
    known: Mapping[str, type[Mixer]] = mixers() if kind == "mixer" else channels()
    if name in known:
        return known[name]
    if not USER_CLASS.fullmatch(name):
        raise unknown(kind, name, known)
    module_name, class_name = name.split(":")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ManyformError(f"cannot import {name!r}: {error}; is its folder on the Python path?"
                            ) from error
    base = SequenceMixer if kind == "mixer" else Mixer
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ManyformError(f"{name!r} is not a {kind}: derive the class from "
                            f"manyform.{base.__name__}")
    return cls


def build(kind: str, spec: str | type[Mixer], d_model: int, place: Place,
          options: Mapping[str, Any]) -> Mixer:
    """Construct a mixer ("mixer") or channel ("channel") by name or class, options checked.

    Raises ManyformError for an unknown name or option.
    """
    cls = resolve(kind, spec) if isinstance(spec, str) else spec
    allowed = cls.options()
    for key in options:
        if key not in allowed:
            raise unknown(f"option of {cls.__name__}", key, allowed)
    return cls(d_model, place=place, **options)


def param_hints(model: nn.Module) -> dict[str, Hint]:
    """The hint of every parameter of `model` by full name; defaults filled in."""
    hints = {name: Hint(weight_decay=p.ndim > 1) for name, p in model.named_parameters()}
    for prefix, module in model.named_modules():
        declared = getattr(module, "hints", None)
        if callable(declared):
            for name, hint in declared().items():
                full = f"{prefix}.{name}" if prefix else name
                if full not in hints:
                    raise ManyformError(f"{type(module).__name__}.hints names {name!r}, "
                                        "which is not one of its parameters")
                hints[full] = hint
    return hints
