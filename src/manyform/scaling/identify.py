"""What a table of runs does not determine, said in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from manyform.scaling.table import short

if TYPE_CHECKING:
    from manyform.scaling.fit import Fit

WIDE = 0.2
"""Width from which on the interval of the best size's exponent does not determine it."""
_SCALES = ("A", "B", "Nc", "Dc", "Cc")


def statements(fit: Fit) -> list[str]:
    """Flat valleys of the fit and gaps of the design, one sentence each; [] if there are none."""
    out = []
    runs = fit.runs
    if "params" in fit.law.inputs and "tokens" in fit.law.inputs:
        n, d = np.log10(runs.params), np.log10(runs.tokens)
        for values, what, coefficient in ((n, "Sizes", "alpha"), (d, "Tokens", "beta")):
            if np.ptp(values) < 1:
                out.append(f"{what} span a factor of {10**np.ptp(values):.1f}: too little to "
                           f"know the exponent {coefficient} well.")
        correlation = float(np.corrcoef(n, d)[0, 1])
        if abs(correlation) > 0.97:
            out.append(f"Size and tokens rise together (correlation {correlation:.2f}): what each "
                       "contributes alone is hardly measured.")
        out += _idle(fit)
        ratio = runs.flops / (runs.params * runs.tokens)
        if ratio.max() > 1.5 * ratio.min():
            out.append(f"FLOPs are between {ratio.min():.1f} and {ratio.max():.1f} per parameter "
                       f"and token, over these sizes; optima are counted at {fit.per_token:.1f}.")
    if not fit.draws:
        return out
    loose = []
    for name in _SCALES:
        if name in fit.law.names():
            low, high = fit.interval(name)
            if not low > 0 or high / low > 3:
                loose.append(f"{name} (a factor of {high / low:.3g})" if low > 0 else name)
    if loose:
        out.append(f"A flat valley: {' and '.join(loose)} trade off against the exponents. Read "
                   "the exponents, the optimum and the loss, not these digits.")
    if "E" in fit.law.names():
        low, high = fit.interval("E")
        if low < 0.05 * float(runs.loss.min()):
            out.append("The floor E is not distinguishable from zero: the losses are still far "
                       "above it.")
    if hasattr(type(fit.law), "a"):
        low, high = fit.interval("a")
        if high - low > WIDE:
            out.append(f"The exponent of the best size is known only to lie between {low:.2f} and "
                       f"{high:.2f}: a hundredfold budget changes the best size by a factor of "
                       f"{short(100**low)} to {short(100**high)}.")
    return out


def _idle(fit: Fit) -> list[str]:
    """A term that adds next to nothing anywhere in the table."""
    law, runs = fit.law, fit.runs
    out = []
    for scale, exponent, column, what, other in (("A", "alpha", "params", "size", "data"),
                                                 ("B", "beta", "tokens", "data", "size")):
        if scale not in law.names():
            continue
        term = getattr(law, scale) * getattr(runs, column) ** -getattr(law, exponent)
        if np.ptp(term) < 0.01 * float(np.median(runs.loss)):
            out.append(f"The loss hardly changes with {what} in this table (by "
                       f"{100 * np.ptp(term) / np.median(runs.loss):.2g}%): {other} limits these "
                       "runs, and where the best size lies is not measured.")
    return out
