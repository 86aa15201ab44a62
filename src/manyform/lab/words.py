"""Numbers as people read them, for the verdict, the tables and the report."""

from __future__ import annotations

import math
from collections.abc import Iterable


def count(n: float | None) -> str:
    """1234567 -> "1.23M"; None -> "" (so in all of these)."""
    if n is None:
        return ""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= 0.9995 * size:
            return f"{_three(n / size)}{unit}"
    return _three(n)


def context(n: float | None) -> str:
    """A length in tokens: 16384 -> "16k"; other numbers as `count` says them."""
    return f"{n / 1024:g}k" if n and n % 1024 == 0 and n < 2**20 else count(n)


def power(n: float | None) -> str:
    """Operations: 2.5e13 -> "2.5e13"."""
    if n is None:
        return ""
    return f"{n:.2e}".replace("e+", "e").replace("e0", "e") if n >= 1e4 else _three(n)


def size(n: float | None) -> str:
    """Bytes: 1536 -> "1.5 KiB"."""
    if n is None:
        return ""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if n >= unit:
            return f"{_three(n / unit)} {name}"
    return f"{n:.0f} B"


def clock(seconds: float | None) -> str:
    """75 -> "1m15s"."""
    if seconds is None:
        return ""
    s = round(seconds)
    if seconds < 10:
        return f"{seconds:.1f}s"
    if s < 60:
        return f"{s}s"
    return f"{s // 60}m{s % 60:02d}s" if s < 3600 else f"{s // 3600}h{s % 3600 // 60:02d}m"


def millis(ms: float | None) -> str:
    """Milliseconds with three digits."""
    return "" if ms is None else _three(ms)


def bpb(value: float | None) -> str:
    """Bits per byte, three decimals."""
    return "" if value is None else f"{value:.3f}"


def bits(value: float | None) -> str:
    """Bits of an answer, or its Brier score: three decimals, small ones in powers of ten."""
    if value is None:
        return ""
    return f"{value:.3f}" if value >= 0.01 or value == 0 else f"{value:.0e}".replace("e-0", "e-")


def share(value: float | None) -> str:
    """0.983 -> "98%"."""
    return "" if value is None else f"{100 * value:.0f}%"


def factor(ratio: float) -> str:
    """1.52 -> "1.5x"."""
    return f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:,.0f}x"


def words(items: Iterable[str]) -> str:
    """("a", "b", "c") -> "a, b and c"."""
    items = list(items)
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" \
        if items else ""


def plural(n: int, noun: str) -> str:
    """2, "seed" -> "two seeds"."""
    names = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    return f"{names[n] if n < len(names) else n} {noun}{'' if n == 1 else 's'}"


def _three(x: float) -> str:
    """Three significant digits without an exponent; whole numbers stay whole."""
    if x == 0 or not math.isfinite(x):
        return f"{x:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(x))))
    text = f"{x:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
