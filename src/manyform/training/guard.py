"""The rule for losses that are not finite and losses that jump.

A step is skipped (no update, no carried state, the schedule and the data go on) if
  1. its loss or gradient norm is not finite, or
  2. its loss is above each of the last 64 accepted losses, and above their median by more than
     `spike` robust deviations (1.4826 times the median absolute deviation) and more than a
     quarter of it, or
  3. its gradient norm is above ten times the largest of the last 64 accepted ones.
2 and 3 begin once the window is full. The bounds are wide on purpose: a healthy run is untouched.
After `patience` skipped steps in a row the run has diverged: `train` goes back to the last
checkpoint made by step count in a healthy state and on with data not seen yet; at the third time
it stops and says so. Everything here is a function of the losses, so a resumed run decides alike.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any, Literal

Verdict = Literal["", "non-finite", "loss spike", "gradient spike"]
_WINDOW = 64
_NORM_FACTOR = 10.0
_LEAST_JUMP = 0.25


class Guard:
    """Judges each step; `streak` counts the skipped ones since the last accepted one."""

    def __init__(self, spike: float, patience: int) -> None:
        self.spike = spike
        self.patience = patience
        self.streak = 0
        self._losses: deque[float] = deque(maxlen=_WINDOW)
        self._norms: deque[float] = deque(maxlen=_WINDOW)

    def judge(self, loss: float, norm: float) -> Verdict:
        """The reason to skip this step, or "" to apply it."""
        verdict = self._verdict(loss, norm)
        if verdict:
            self.streak += 1
        else:
            self.streak = 0
            self._losses.append(loss)
            self._norms.append(norm)
        return verdict

    def _verdict(self, loss: float, norm: float) -> Verdict:
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return "non-finite"
        if self.spike == 0 or len(self._losses) < _WINDOW:
            return ""
        # The cheap comparison first: almost every step ends here.
        if loss > max(self._losses):
            middle = median(self._losses)
            deviation = 1.4826 * median(abs(x - middle) for x in self._losses)
            if loss - middle > max(self.spike * deviation, _LEAST_JUMP * abs(middle)):
                return "loss spike"
        if norm > _NORM_FACTOR * max(self._norms):
            return "gradient spike"
        return ""

    @property
    def diverged(self) -> bool:
        """True after `patience` skipped steps in a row."""
        return self.streak >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"streak": self.streak, "losses": list(self._losses), "norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what `state_dict` gave."""
        self.streak = state["streak"]
        self._losses = deque(state["losses"], maxlen=_WINDOW)
        self._norms = deque(state["norms"], maxlen=_WINDOW)
