"""The laws. Each takes a subject and returns a detail, or raises LawError."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from manyform import state as states
from manyform.contract import STATE_ORDER, SequenceMixer, param_hints
from manyform.errors import ManyformError
from manyform.laws.compare import (
    TOLERANCE,
    distance,
    require_close,
    require_gradients_close,
    require_states_close,
)
from manyform.laws.report import LawError
from manyform.laws.subject import Subject
from manyform.ops.operation import count, use
from manyform.state import State


def streaming(subject: Subject, length: int) -> str:
    """Any cut of the sequence gives what one call gives: outputs, final state, gradients."""
    x = subject.input(2, length)
    prefix = subject.input(2, 5)
    weights: Tensor | None = None
    with torch.no_grad():
        _, warm = subject(prefix)

    def run(pieces: list[int], begin: State = warm) -> tuple[Tensor, State, list[Tensor]]:
        nonlocal weights
        start = states.map_tensors(
            lambda t: t.detach().clone().requires_grad_(t.is_floating_point()), begin)
        inputs = x.clone().requires_grad_()
        state, ys = start, []
        for piece in inputs.split(pieces, dim=1):
            y, state = subject(piece, state)
            ys.append(y)
        y = torch.cat(ys, dim=1)
        if weights is None:
            weights = subject.weights_like(y)
        wanted = [inputs, *subject.parameters(),
                  *(t for t in states.tensors(start) if t.requires_grad)]
        found = torch.autograd.grad((y.to(weights.dtype) * weights).sum(), wanted,
                                    allow_unused=True)
        grads = [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, found,
                                                                        strict=True)]
        return y, state, grads

    def truth() -> list[Tensor]:
        with subject.in_float32():
            return run([length], _widened(warm))[2]

    whole, whole_state, whole_grads = run([length])
    cuts = subject.integers(1, length, min(4, length - 1))
    random = [b - a for a, b in itertools.pairwise([0, *cuts, length])]
    worst = 0.0
    for name, pieces in (("random cuts", random), ("token by token", [1] * length)):
        y, state, grads = run(pieces)
        worst = max(worst, require_close(y, whole, f"outputs, {name},", subject.precision))
        require_states_close(state, whole_state, f"final states, {name},", subject.precision)
        worst = max(worst, require_gradients_close(grads, whole_grads, truth,
                                                   f"gradients, {name},", subject.precision))
    with torch.no_grad():
        alone, _ = subject(x)
        fresh, _ = subject(x, subject.initial_state(2))
    require_close(fresh, alone, "outputs from initial_state and from None", subject.precision)
    return f"largest relative error {worst:.1e}"


def causality(subject: Subject, length: int) -> str:
    """The gradient of output i with respect to input j > i is exactly zero."""
    x = subject.input(2, length).requires_grad_()
    y, _ = subject(x)
    leak = 0.0
    for i in subject.integers(0, length - 1, min(6, length - 1)):
        weights = subject.weights_like(y[:, i])
        (grad,) = torch.autograd.grad((y[:, i].to(weights.dtype) * weights).sum(), x,
                                      retain_graph=True)
        leak = max(leak, float(grad[:, i + 1:].abs().max() / grad.abs().max().clamp(min=1e-30)))
    exact = all(getattr(m, "exactly_causal", True) for m in subject.mixers)
    allowed = 0.0 if exact else {"float64": 1e-12, "float32": 1e-4, "bfloat16": 1e-2}[
        subject.precision]
    if leak > allowed:
        raise LawError(f"an output depends on a later input: gradient {leak:.2g} of the largest, "
                       f"allowed {allowed:g}")
    return "no gradient from the future" if exact else f"to rounding ({leak:.1e}; by FFT)"


def packing(subject: Subject, length: int) -> str:
    """Documents packed with `reset` give what each gives alone, whatever state came before."""
    x = subject.input(2, length).requires_grad_()
    with torch.no_grad():
        _, warm = subject(subject.input(2, 7))
    bounds = [[0, *subject.integers(1, length, 3), length] for _ in range(2)]
    reset = torch.zeros(2, length, dtype=torch.bool, device=x.device)
    for row, edges in enumerate(bounds):
        reset[row, edges[:-1]] = True
    y, state = subject(x, warm, reset)
    weights = subject.weights_like(y)
    (grad,) = torch.autograd.grad((y.to(weights.dtype) * weights).sum(), x)
    follow = subject.input(2, 3)
    with torch.no_grad():
        after, _ = subject(follow, states.detach(state))
    worst = 0.0
    for row, edges in enumerate(bounds):
        for a, b in itertools.pairwise(edges):
            here = (slice(row, row + 1), slice(a, b))
            alone, alone_state, alone_grad = _by_itself(subject, x[here], weights[here])
            worst = max(worst, require_close(y[here], alone, "packed outputs", subject.precision),
                        _packed_gradients(subject, x[here], weights[here], grad[here], alone_grad))
        with torch.no_grad():
            want, _ = subject(follow[row:row + 1], states.detach(alone_state))
        require_close(after[row:row + 1], want, "outputs after the last document",
                      subject.precision)
    cut = length // 2
    with torch.no_grad():
        first, middle = subject(x[:, :cut].detach(), warm, reset[:, :cut])
        second, _ = subject(x[:, cut:].detach(), middle, reset[:, cut:])
    require_close(torch.cat([first, second], 1), y, "packed outputs in two chunks",
                  subject.precision)
    return f"largest relative error {worst:.1e}"


def packing_without_state(subject: Subject, length: int) -> str:
    """Packing for a mixer that looks ahead: outputs and gradients of each document alone."""
    x = subject.input(2, length).requires_grad_()
    cut = length // 3
    reset = torch.zeros(2, length, dtype=torch.bool, device=x.device)
    reset[:, cut] = True
    if not subject.packs:
        try:
            subject(x, None, reset)
        except ManyformError as error:
            return f"refused: {error}"
        raise LawError("a mixer that is declared not to pack accepted reset")
    y, _ = subject(x, None, reset)
    weights = subject.weights_like(y)
    (grad,) = torch.autograd.grad((y.to(weights.dtype) * weights).sum(), x)
    worst = 0.0
    for a, b in ((0, cut), (cut, length)):
        here = (slice(None), slice(a, b))
        alone, _, alone_grad = _by_itself(subject, x[here], weights[here])
        worst = max(worst, require_close(y[here], alone, "packed outputs", subject.precision),
                    _packed_gradients(subject, x[here], weights[here], grad[here], alone_grad))
    return f"largest relative error {worst:.1e}"


def _by_itself(subject: Subject, x: Tensor, weights: Tensor) -> tuple[Tensor, State, Tensor]:
    """One document in a call of its own: outputs, state, gradient with respect to x."""
    piece = x.detach().requires_grad_()
    y, state = subject(piece)
    (grad,) = torch.autograd.grad((y.to(weights.dtype) * weights).sum(), piece)
    return y, state, grad


def _packed_gradients(subject: Subject, x: Tensor, weights: Tensor, packed: Tensor, alone: Tensor,
                      ) -> float:
    """The gradient of a packed document against that of the document alone."""
    def truth() -> list[Tensor]:
        with subject.in_float32():
            return [_by_itself(subject, x, weights)[2]]
    return require_gradients_close([packed], [alone], truth, "packed gradients",
                                   subject.precision)


def batch(subject: Subject, length: int) -> str:
    """A row's result does not depend on its neighbours, even if they are not finite."""
    x = subject.input(3, length)
    with torch.no_grad():
        together, _ = subject(x)
        x[1] = float("nan")
        poisoned, _ = subject(x)
        alone, _ = subject(x[2:])
    worst = require_close(alone, together[2:], "a row alone and in its batch", subject.precision)
    for row in (0, 2):
        require_close(poisoned[row], together[row], "rows beside a poisoned one",
                      subject.precision)
    return f"largest relative error {worst:.1e}"


def fork(subject: Subject, length: int) -> str:
    """A state used twice gives the same answer twice, and is not changed by use."""
    x, other = subject.input(2, 6), subject.input(2, 6)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            _, state = subject(subject.input(2, length))
            before = states.clone(states.detach(state))
            first, mine = subject(x, state)
            mine_before = states.clone(states.detach(mine))
            other_fork = state
            for t in range(6):
                _, other_fork = subject(other[:, t:t + 1], other_fork)
            again, _ = subject(x, state)
        if not states.equal(states.detach(state), before):
            raise LawError("the state was changed in place by using it")
        if not states.equal(states.detach(mine), mine_before):
            raise LawError("a state was changed by continuing another fork")
        if not torch.equal(first, again):
            raise LawError("the same state gave two different answers: they differ by "
                           f"{distance(first, again, subject.precision):.2g}")
    picked = states.select(before, [1, 0, 1])
    with torch.no_grad():
        rows, _ = subject(x[[1, 0, 1]], picked)
    require_close(rows, first[[1, 0, 1]], "outputs from selected rows", subject.precision)
    return "same bits"


def reference(subject: Subject, length: int) -> str:
    """The fast form equals the reference, forward and gradient, odd lengths included."""
    worst = 0.0
    for n in (1, 2, 17, length):
        rows = max(2, 16 // n)  # enough tokens that one rounded away at a kink does not tell
        x = subject.input(rows, n)
        reset = torch.zeros(rows, n, dtype=torch.bool, device=x.device)
        reset[1, n // 2] = True
        with torch.no_grad():
            _, warm = subject(subject.input(rows, 5))
        marked = [(warm, reset)] if subject.packs else []
        for state, marks in ((None, None), *marked):
            worst = max(worst, _both_forms(subject, x, state, marks))
    return f"largest relative error {worst:.1e}"


def _both_forms(subject: Subject, x: Tensor, state: State, marks: Tensor | None) -> float:
    """The fast form and the reference of one call: the largest relative error."""
    weights: Tensor | None = None

    def run(path: str | None, begin: State) -> tuple[Tensor, State, Sequence[Tensor | None]]:
        nonlocal weights
        with use(path):
            inputs = x.clone().requires_grad_()
            y, after = subject(inputs, begin, marks)
            weights = subject.weights_like(y) if weights is None else weights
            return y, after, torch.autograd.grad((y.to(weights.dtype) * weights).sum(),
                                                 [inputs, *subject.parameters()],
                                                 allow_unused=True)

    def truth() -> Sequence[Tensor | None]:
        with subject.in_float32():
            return run("reference", _widened(state))[2]

    (y, after, grads), (y0, after0, grads0) = (run(path, state) for path in (None, "reference"))
    at = f"at length {x.shape[1]}"
    worst = require_close(y, y0, f"fast and reference outputs {at}", subject.precision)
    require_states_close(after, after0, f"fast and reference states {at}", subject.precision)
    return max(worst, require_gradients_close(grads, grads0, truth,
                                              f"fast and reference gradients {at}",
                                              subject.precision))


def _widened(state: State) -> State:
    """The state with float32 in place of bfloat16."""
    return states.map_tensors(lambda t: t.float() if t.dtype == torch.bfloat16 else t, state)


def cost(subject: Subject, length: int) -> str:
    """Counted operations and measured state bytes equal the declared ones."""
    for n in (1, length // 3, length):
        with torch.no_grad(), count() as counter:
            _, state = subject(subject.input(1, n))
        if not subject.module.exact_cost:
            limit = subject.module.cost_limit(n)
            if counter.total > limit.flops or states.nbytes(state) > limit.state_bytes:
                raise LawError(f"at length {n} the forward pass takes {counter.total} operations "
                               f"and a state of {states.nbytes(state)} bytes, more than the limits "
                               f"declared: {limit.flops} and {limit.state_bytes}")
            continue
        declared = subject.cost(n)
        if counter.total != declared.flops:
            raise LawError(f"at length {n} the forward pass takes {counter.total} operations "
                           f"({dict(counter.by_name)}), declared {declared.flops}")
        if states.nbytes(state) != declared.state_bytes:
            raise LawError(f"at length {n} the state takes {states.nbytes(state)} bytes, "
                           f"declared {declared.state_bytes}")
    declared_growths = [m.growth[0] for m in subject.mixers if isinstance(m, SequenceMixer)]
    growth = max(declared_growths, key=STATE_ORDER.index, default=None)  # a channel declares none
    # What empties again, as a segment does, is as large as it gets within some tokens.
    span = 64 if growth in ("window", "linear") else 1
    sizes = [max(subject.module.cost_limit(m).state_bytes for m in range(n, n + span))
             for n in (1, 4 * length, 8 * length)]
    grows = {"none": sizes[2] == sizes[0], "constant": sizes[2] == sizes[0],
             "window": sizes[0] <= sizes[1] == sizes[2], "linear": sizes[2] > sizes[1]}
    if growth is not None and not grows[growth]:
        raise LawError(f"the state is declared {growth}, and takes {sizes} bytes at lengths "
                       f"1, {4 * length} and {8 * length}")
    return f"{subject.cost(length).flops} operations, {subject.cost(length).state_bytes} bytes"


def recipe(subject: Subject, length: int) -> str:
    """Hints name real parameters, and weight decay and learning-rate scales reach the optimizer."""
    from manyform.training import TrainConfig, param_groups
    hints = param_hints(subject.module)
    if not hints:
        return "no parameters"
    config = TrainConfig(lr=0.5, weight_decay=0.25)
    groups = param_groups(subject.module, config)
    placed = {id(p): g for g in groups for p in g["params"]}
    if sum(len(g["params"]) for g in groups) != len(placed):
        raise LawError("a parameter is in two optimizer groups")
    for name, p in subject.module.named_parameters():
        group = placed.get(id(p))
        if group is None:
            raise LawError(f"the parameter {name} reaches no optimizer group")
        want = hints[name]
        if (group["weight_decay"] != 0) != want.weight_decay:
            raise LawError(f"{name} asks for weight decay {want.weight_decay}, and gets "
                           f"{group['weight_decay']}")
        if abs(group["lr"] - 0.5 * want.lr_scale) > 1e-12:
            raise LawError(f"{name} asks for a learning rate times {want.lr_scale}, and gets "
                           f"{group['lr'] / 0.5:g}")
    special = sum(h.lr_scale != 1 for h in hints.values())
    return f"{len(hints)} parameters, {special} with a learning rate of their own"


def persistence(subject: Subject, length: int) -> str:
    """Saved and loaded, module and state give the same bits."""
    from safetensors.torch import load_file, save_file
    x, more = subject.input(2, length), subject.input(2, 4)
    with torch.no_grad():
        _, state = subject(x)
        want, _ = subject(more, state)
    with tempfile.TemporaryDirectory() as folder:
        weights, saved = Path(folder) / "weights.safetensors", Path(folder) / "state.safetensors"
        tied = {k: v.detach().clone() for k, v in subject.module.state_dict().items()}
        save_file(tied, str(weights))
        if state is not None:
            states.save(state, saved)
        with torch.no_grad():
            for p in subject.module.parameters():
                p.zero_()
        subject.module.load_state_dict(load_file(str(weights)))
        back = None if state is None else states.to(
            states.load(saved, like=subject.initial_state(2)), subject.device)
    if not states.equal(back, states.map_tensors(lambda t: t.to(subject.device), state)):
        raise LawError("a loaded state differs from the saved one")
    with torch.no_grad():
        got, _ = subject(more, back)
    if not torch.equal(got, want):
        raise LawError(f"outputs after loading differ by "
                       f"{distance(got, want, subject.precision):.2g}")
    return "same bits"


def precision(subject: Subject, length: int) -> str:
    """bfloat16 stays near float32; states that do not grow are kept in float32."""
    x = subject.input(2, length)
    with torch.no_grad():
        low, state = subject(x)
        with subject.in_float32():
            want, _ = subject(x)
    error = distance(low, want, "bfloat16")
    if not error <= TOLERANCE["bfloat16"]:
        raise LawError(f"bfloat16 outputs are {error:.2g} away from float32 (relative norm), "
                       f"allowed {TOLERANCE['bfloat16']:g}")
    start = subject.initial_state(2)
    for now, first in zip(states.tensors(state), states.tensors(start), strict=True):
        same = now.shape == first.shape and now.numel()
        if same and now.is_floating_point() and now.dtype != torch.float32:
            raise LawError(f"a state of fixed size is kept in {now.dtype}, expected float32")
    return f"relative error {error:.1e}"


def refuses_to_stream(subject: Subject, length: int) -> str:
    """A mixer that is not causal says so when it is asked to continue from a state."""
    _, state = subject(subject.input(1, 4))
    try:
        subject(subject.input(1, 1), state if state is not None else (None,))
    except ManyformError as error:
        return f"refused: {error}"
    raise LawError("a mixer that is declared non-causal accepted a state")


Law = Callable[[Subject, int], str]
ALL = ("float64", "float32", "bfloat16")
LAWS: dict[str, tuple[Law, tuple[str, ...]]] = {
    "streaming": (streaming, ALL),
    "causality": (causality, ALL),
    "packing": (packing, ALL),
    "batch": (batch, ("float64", "float32")),
    "fork": (fork, ("float32", "bfloat16")),
    "reference": (reference, ALL),
    "cost": (cost, ("float32",)),
    "recipe": (recipe, ("float32",)),
    "persistence": (persistence, ("float32",)),
    "precision": (precision, ("bfloat16",)),
}
ROUNDED = ("streaming", "packing", "reference", "precision")
"""Laws that compare two ways to compute the same, which in bfloat16 round differently."""
WITHOUT_STATE: dict[str, Law | None] = {
    "streaming": refuses_to_stream,
    "causality": None,
    "packing": packing_without_state,
    "fork": None,
}
"""What becomes of a law for a mixer that looks ahead; None: it does not apply."""
