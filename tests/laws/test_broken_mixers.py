"""A mixer that is broken on purpose fails the law that it breaks: the suite can fail."""

import pytest
import torch

import manyform
from manyform.contract import Cost, Hint, SequenceMixer
from manyform.init import linear


class Average(SequenceMixer):
    """An honest mixer: the exponential average of a projection."""

    def __init__(self, d_model, *, place=manyform.Place()):
        super().__init__(d_model, place=place)
        self.project = linear(d_model, d_model)
        self.rate = torch.nn.Parameter(torch.full((d_model,), 0.5))

    def initial_state(self, batch_size, *, device=None):
        weight = self.project.weight
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        return (torch.zeros(batch_size, self.d_model, dtype=wide, device=device or weight.device),)

    def mix(self, x, s, reset):
        keep = torch.sigmoid(self.rate)
        ys = []
        for t in range(x.shape[1]):
            if reset is not None:
                s = s * ~reset[:, t, None]
            s = keep * s + (1 - keep) * x[:, t]
            ys.append(s)
        return torch.stack(ys, 1), s

    def forward(self, x, state=None, *, reset=None):
        (s,) = self.initial_state(x.shape[0]) if state is None else state
        y, s = self.mix(self.project(x).to(s.dtype), s, reset)
        return y.to(x.dtype), (s,)

    def cost(self, length):
        return Cost(2 * length * self.d_model**2, 4 * self.d_model)


class LeaksFuture(Average):
    def forward(self, x, state=None, *, reset=None):
        y, s = super().forward(x, state, reset=reset)
        return y + 1e-6 * x.mean(1, keepdim=True), s


class DropsState(Average):
    def forward(self, x, state=None, *, reset=None):
        return super().forward(x, None, reset=reset)


class DetachesState(Average):
    def forward(self, x, state=None, *, reset=None):
        y, (s,) = super().forward(x, state, reset=reset)
        return y, (s.detach(),)


class IgnoresReset(Average):
    def forward(self, x, state=None, *, reset=None):
        return super().forward(x, state, reset=None)


class MutatesState(Average):
    def forward(self, x, state=None, *, reset=None):
        y, (s,) = super().forward(x, state, reset=reset)
        if state is not None:
            with torch.no_grad():
                state[0].copy_(s)
        return y, (s,)


class MixesRows(Average):
    def forward(self, x, state=None, *, reset=None):
        y, s = super().forward(x, state, reset=reset)
        return y + 1e-3 * y.mean(0, keepdim=True), s


class WrongCost(Average):
    def cost(self, length):
        return Cost(super().cost(length).flops + 1, 4 * self.d_model)


class WrongStateBytes(Average):
    def cost(self, length):
        return Cost(super().cost(length).flops, 4 * self.d_model + 4)


class WrongGrowth(Average):
    state_growth = "linear"


class WrongHint(Average):
    def hints(self):
        return {"no_such_parameter": Hint(weight_decay=False)}


class LowPrecisionState(Average):
    def forward(self, x, state=None, *, reset=None):
        y, (s,) = super().forward(x, state, reset=reset)
        return y, (s.bfloat16() if s.dtype == torch.float32 and x.dtype != torch.float64 else s,)


class ForgetsOnLoad(Average):
    def __init__(self, d_model, *, place=manyform.Place()):
        super().__init__(d_model, place=place)
        self.secret = 1.0

    def forward(self, x, state=None, *, reset=None):
        y, s = super().forward(x, state, reset=reset)
        self.secret += 1
        return y * self.secret, s


def broken_laws(mixer):
    report = manyform.check(mixer, raise_on_failure=False, length=40)
    return {result.law for result in report.failures}


def test_the_honest_mixer_passes():
    assert broken_laws(Average) == set()


@pytest.mark.parametrize(("mixer", "law"), [
    (LeaksFuture, "causality"), (LeaksFuture, "streaming"), (DropsState, "streaming"),
    (DetachesState, "streaming"), (IgnoresReset, "packing"), (MutatesState, "fork"),
    (MixesRows, "batch"), (WrongCost, "cost"), (WrongStateBytes, "cost"), (WrongGrowth, "cost"),
    (WrongHint, "recipe"), (LowPrecisionState, "precision"), (ForgetsOnLoad, "persistence"),
], ids=lambda value: getattr(value, "__name__", value))
def test_a_broken_mixer_fails_its_law(mixer, law):
    assert law in broken_laws(mixer)


def test_a_wrong_fast_form_fails_the_reference_law():
    from manyform.ops.operation import operation

    @operation(flops=lambda x: 0)
    def doubled_for_the_test(x):
        return 2 * x

    @doubled_for_the_test.path("wrong")
    def _(x):
        return 2.01 * x

    class UsesIt(Average):
        def forward(self, x, state=None, *, reset=None):
            y, s = super().forward(x, state, reset=reset)
            return doubled_for_the_test(y), s

    assert broken_laws(UsesIt) == {"reference"}


def test_check_raises_and_names_the_law():
    with pytest.raises(manyform.laws.LawError, match="causality"):
        manyform.check(LeaksFuture, laws=["causality"], length=40)


def test_unknown_names_are_refused():
    with pytest.raises(manyform.ManyformError, match="did you mean 'streaming'"):
        manyform.check(Average, laws=["streming"])
    with pytest.raises(manyform.ManyformError, match="unknown architecture"):
        manyform.check("no_such_thing")
