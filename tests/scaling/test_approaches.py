"""The three routes to the best size, and several architectures over one text."""

import numpy as np
import pytest
from tests.scaling.synthetic import EPOCH, HOFFMANN, UNEQUAL, grid, iso, runs

from manyform.errors import ManyformError
from manyform.scaling import Chinchilla, fit
from manyform.scaling.approaches import bias, compare, corrected, envelope, parabolas, spread
from manyform.scaling.families import fit_archs, paired
from manyform.scaling.summary import crossing_text, headline
from manyform.scaling.table import join

BUDGETS = np.geomspace(1e18, 1e21, 6)


@pytest.mark.parametrize(("law", "off"), [
    (Chinchilla(1.7, 400.0, 400.0, 0.3, 0.3), 0.0), (HOFFMANN, 0.085), (EPOCH, -0.024),
    (UNEQUAL, 0.49)])
def test_parabolas_are_off_by_the_known_bias(law, off):
    """The figures of a centred grid of 1.5 decades either side, 15 points, without noise."""
    table = iso(law, BUDGETS, points=15, spread=1.5)
    _, sizes = parabolas(table)
    true = np.array([law.optimal(flops=c).params for c in BUDGETS])
    assert np.allclose(sizes / true - 1, off, atol=0.012)
    assert np.allclose(bias(table, law)[1], sizes / true, rtol=1e-3)
    assert np.allclose(corrected(table, law)[1], true, rtol=1e-3)


def test_all_routes_side_by_side():
    curves = []
    for i, size in enumerate(np.geomspace(3e7, 3e9, 14)):
        tokens = np.geomspace(size * 1.5, size * 400, 25)
        curves.append(runs(np.full(25, size), tokens, HOFFMANN.predict(np.full(25, size), tokens)
                           * np.exp(0.001 * np.random.default_rng(i).standard_normal(25)),
                           run=[f"size {i}"] * 25))
    got = compare(fit(join(curves), bootstraps=50), replicates=30)
    assert [x.name[0] for x in got] == ["1", "2", "2", "3"]
    assert got[0].a == pytest.approx(HOFFMANN.a, abs=0.03)
    assert got[3].a == pytest.approx(HOFFMANN.a, abs=0.02)
    assert got[1].a == pytest.approx(HOFFMANN.a, abs=0.03)
    assert spread(got) < 0.04

    got = compare(fit(iso(UNEQUAL, BUDGETS, spread=1.2, noise=0.002), bootstraps=100),
                  replicates=50)
    plain, right, law = got[1], got[2], got[3]
    middle = float(np.exp(np.log(BUDGETS).mean()))
    true = UNEQUAL.optimal(flops=middle).params
    assert plain.reference / true > 1.25
    assert abs(np.log(right.reference / true)) < abs(np.log(plain.reference / true)) / 2
    assert law.low_reference < true < law.high_reference
    assert plain.low < plain.a < plain.high


def test_a_table_without_leaders_or_budgets_says_so():
    ladder = np.geomspace(1e7, 1e9, 12)
    table = runs(ladder, 20 * ladder, EPOCH.predict(ladder, 20 * ladder))
    with pytest.raises(ManyformError, match="0 isoFLOP profiles"):
        parabolas(table)
    with pytest.raises(ManyformError, match="fewer than three sizes"):
        envelope(runs([1e6, 2e6, 3e6], [1e8] * 3, [3, 2, 1]))


LLAMA = Chinchilla(1.5, 300.0, 900.0, 0.33, 0.35)
LSTM = Chinchilla(1.5, 60.0, 900.0, 0.24, 0.35)


def test_architectures_cross_where_their_laws_do():
    """The Transformer of this pair loses at small compute and wins at large."""
    table = join([grid(LLAMA, sizes=6, ratios=8, low=1e5, high=1e8, noise=0.003, arch="llama"),
                  grid(LSTM, sizes=6, ratios=8, low=1e5, high=1e8, noise=0.003, seed=1,
                       arch="lstm")])
    got = fit_archs(table, bootstraps=100)
    assert list(got.free) == ["llama", "lstm"]
    budgets = np.geomspace(1e10, 1e22, 400)
    gap = [LLAMA.optimal(flops=c).loss - LSTM.optimal(flops=c).loss for c in budgets]
    true = budgets[np.flatnonzero(np.diff(np.sign(gap)))[0]]
    cross = got.crossings()[0]
    assert cross.first == "lstm"
    assert cross.low < true < cross.high
    assert cross.crossed > 0.9
    assert cross.chance_low < 0.1 < 0.9 < cross.chance_high
    chances = got.chances([1e11, 1e22])
    assert chances["llama"][0] < 0.1 < 0.9 < chances["llama"][1]
    assert np.allclose(chances["llama"] + chances["lstm"], 1)


def test_who_is_ahead_is_said_with_its_chance():
    table = join([grid(law, sizes=5, ratios=6, low=1e6, high=1e9, noise=0.003, seed=seed, arch=name)
                  for seed, (name, law) in enumerate([
                      ("best", EPOCH), ("twin", EPOCH),
                      ("worse", Chinchilla(2.1, 482.01, 2085.43, 0.3478, 0.3658))])])
    got = fit_archs(table, bootstraps=60)
    standing = got.standing()
    assert standing.flops == min(f.largest for f in got.free.values())
    assert list(standing.losses)[-1] == "worse"
    assert standing.close == [n for n in ("best", "twin") if n != standing.first]
    assert standing.chance["worse"] > 0.95
    assert standing.gaps["worse"][0] > 0
    assert sum(standing.best.values()) == pytest.approx(1)
    crossings = got.crossings()
    text = " ".join(headline(got, crossings))
    assert "the laws cannot tell it from" in text
    assert "it is ahead of worse (over 99%)" in text
    assert "Without a law, the best run within that budget" in text
    words = {(c.a, c.b): crossing_text(c) for c in crossings}
    assert "is ahead of worse" in words["best", "worse"]
    assert "the laws cannot tell" in words["best", "twin"]
    clear = fit_archs(table.take(table.arch != "twin"), bootstraps=60)
    text = " ".join(headline(clear, clear.crossings()))
    assert "best is ahead: " in text
    assert "no two cross" in text


def test_runs_of_the_same_size_and_tokens_are_paired():
    same = [grid(law, sizes=4, ratios=4, noise=0.0, seed=3) for law in (LLAMA, LSTM)]
    cells, ahead = paired(*same)
    assert cells == 16
    assert ahead == sum(a < b for a, b in zip(same[0].loss, same[1].loss, strict=True))
    assert paired(same[0], grid(LSTM, sizes=4, ratios=4, low=1e3, high=1e5, seed=3)) == (0, 0)


def test_budgets_that_were_not_measured_for_both():
    got = fit_archs(join([grid(LLAMA, sizes=4, ratios=4, low=1e5, high=1e6, arch="small"),
                          grid(LSTM, sizes=4, ratios=4, low=1e9, high=1e10, arch="large")]),
                    bootstraps=60)
    crossings = got.crossings()
    assert "no budget was measured for both" in crossing_text(crossings[0])
    assert "No budget was measured for every architecture" in headline(got, crossings)[0]


def test_shared_exponents_beside_free_ones():
    shifted = Chinchilla(1.5, 360.0, 700.0, 0.33, 0.35)
    table = join([grid(LLAMA, sizes=8, ratios=8, noise=0.004, arch="llama"),
                  grid(shifted, sizes=8, ratios=8, noise=0.004, seed=1, arch="mamba")])
    got = fit_archs(table, bootstraps=100)
    laws = got.shared
    assert laws["llama"].alpha == laws["mamba"].alpha
    assert laws["llama"].E == laws["mamba"].E
    assert got.evidence > 0
    for name, law in (("llama", LLAMA), ("mamba", shifted)):
        low, high = laws[name].interval("alpha")
        assert low < law.alpha < high
        assert high - low < np.ptp(got.free[name].interval("alpha"))
    apart = join([grid(LLAMA, sizes=6, ratios=8, noise=0.003, arch="llama"),
                  grid(LSTM, sizes=6, ratios=8, noise=0.003, seed=1, arch="lstm")])
    assert fit_archs(apart, bootstraps=0).evidence < 0


def test_an_architecture_that_cannot_be_fitted_is_named():
    table = join([grid(LLAMA, sizes=5, ratios=5, arch="llama"),
                  grid(LSTM, sizes=1, ratios=9, arch="lstm")])
    got = fit_archs(table, bootstraps=0)
    assert list(got.free) == ["llama"]
    assert "holds one size" in got.refused["lstm"]
    with pytest.raises(ManyformError, match="holds 2 architectures"):
        fit(table)
    assert fit(table, arch="llama", bootstraps=0).runs.archs == ["llama"]
    with pytest.raises(ManyformError, match="unknown coefficient"):
        fit_archs(table, share=["gamma"])
