"""The laws of the contract as one suite that anyone can run: `manyform.check("mamba2")`."""

from manyform.laws.check import check
from manyform.laws.report import LawError, LawReport, LawResult

__all__ = ["LawError", "LawReport", "LawResult", "check"]
