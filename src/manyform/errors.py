"""The one exception that a user is meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ManyformError(ValueError):
    """What was expected, what was given, what to do; the command line prints it as it is."""


def unknown(kind: str, given: object, known: Iterable[str]) -> ManyformError:
    """The error for a name that is not among `known`, with the nearest ones suggested."""
    names = sorted(known)
    near = difflib.get_close_matches(str(given), names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(names)}"
    return ManyformError(f"unknown {kind} {str(given)!r}; {hint}")
