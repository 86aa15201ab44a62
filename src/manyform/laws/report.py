"""What a check found: one result a law and precision."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Status = Literal["passed", "failed", "does not apply"]


class LawError(AssertionError):
    """A law is broken; the message says which, by how much, and where."""


@dataclass(frozen=True)
class LawResult:
    """law: its name; dtype: the precision it was tried in; detail: a figure or a reason."""

    law: str
    dtype: str
    status: Status
    detail: str


@dataclass
class LawReport:
    """All results for one subject, and the path that each of its operations took."""

    subject: str
    results: list[LawResult] = field(default_factory=list)
    paths: dict[str, str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True if no law is broken."""
        return all(r.status != "failed" for r in self.results)

    @property
    def failures(self) -> list[LawResult]:
        """The broken laws."""
        return [r for r in self.results if r.status == "failed"]

    def raise_if_failed(self) -> LawReport:
        """Raise LawError naming every broken law, or return the report."""
        if not self.passed:
            raise LawError(f"{self.subject} breaks the contract:\n" + "\n".join(
                f"  {r.law} ({r.dtype}): {r.detail}" for r in self.failures))
        return self

    def __str__(self) -> str:
        width = max((len(r.law) for r in self.results), default=0)
        lines = [f"{self.subject}: {'all laws hold' if self.passed else 'BREAKS THE CONTRACT'}"]
        lines += [f"  {r.law:<{width}}  {r.dtype:<9} {r.status:<15} {r.detail}"
                  for r in self.results]
        if self.paths:
            lines.append("  paths: " + ", ".join(f"{op} {path}" for op, path in self.paths.items()))
        return "\n".join(lines)
