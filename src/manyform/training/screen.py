"""What a person sees while a run goes on: a live line in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Any

from manyform.training.trainer import StepResult

_LIVE_SECONDS = 0.25
_PLAIN_SECONDS = 10.0


class Screen:
    """Shows progress of `total` steps.

    peak_flops: the machine's measured rate of matrix products, for the share that is used.
    bits: bits per byte for each nat per token, or None. quiet: show nothing.
    """

    def __init__(self, *, total: int, peak_flops: float, bits: float | None,
                 quiet: bool = False) -> None:
        self.total, self.peak_flops, self.bits, self.quiet = total, peak_flops, bits, quiet
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=200)
        self._shown = 0.0
        self._evaluation = ""
        self._live: Any = None
        if not quiet:
            from rich.console import Console
            self._console = Console(highlight=False)

    def __enter__(self) -> Screen:
        if not self.quiet and self._console.is_terminal:
            from rich.progress import BarColumn, Progress, TextColumn
            self._live = Progress(
                TextColumn("step {task.completed:.0f}/{task.total:.0f}"), BarColumn(bar_width=20),
                TextColumn("{task.fields[text]}"), console=self._console, auto_refresh=False)
            self._task = self._live.add_task("", total=self.total, text="")
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.quiet:
            self._console.print(text, markup=False, soft_wrap=True)

    def step(self, result: StepResult) -> None:
        """Show a step, if the last one shown was long enough ago."""
        if self.quiet:
            return
        self._recent.append((result.seconds, result.tokens, result.flops))
        now = time.monotonic()
        live = self._live is not None
        done = result.step + 1 == self.total
        if now - self._shown < (_LIVE_SECONDS if live else _PLAIN_SECONDS) and not done:
            return
        self._shown = now
        text = self._describe(result)
        if live:
            self._live.update(self._task, completed=result.step + 1, text=text, refresh=True)
        else:
            self.say(f"step {result.step + 1}/{self.total}  {text}")

    def evaluation(self, step: int, nats: float, bits_per_byte: float | None) -> None:
        """Show an evaluation, and keep it on the live line."""
        text = loss_text(nats, bits_per_byte)
        self._evaluation = f"  val {bits_per_byte if bits_per_byte is not None else nats:.4f}"
        if self._live is None:
            self.say(f"step {step}/{self.total}  validation {text}")

    def _describe(self, result: StepResult) -> str:
        seconds, tokens, flops = (sum(x) for x in zip(*self._recent, strict=True))
        left = (self.total - result.step - 1) * seconds / len(self._recent)
        bits = None if self.bits is None else result.loss * self.bits
        return (f"{loss_text(result.loss, bits)}{self._evaluation if self._live else ''}  "
                f"{tokens / seconds:,.0f} tok/s  {flops / seconds / self.peak_flops:.1%} of peak  "
                f"{duration(left)} left")


def loss_text(nats: float, bits_per_byte: float | None) -> str:
    """A loss as text, in nats per token and, where known, bits per byte."""
    return f"loss {nats:.4f}" + (f"  {bits_per_byte:.4f} bits/byte"
                                 if bits_per_byte is not None else "")


def duration(seconds: float) -> str:
    """12s, 3m05s, 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
