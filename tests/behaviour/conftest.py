"""Measured figures of the behaviour runs go into one file beside the benchmarks'."""

import time

import pytest
from benchmarks.behaviour import keep


@pytest.fixture
def record():
    """`record(run, claim=..., source=..., reproduced=..., **figures)`: see
    `benchmarks.behaviour.keep`; with it the processor minutes since the test began or last
    recorded."""
    begun = time.process_time()

    def write(run, **line):
        nonlocal begun
        minutes, begun = (time.process_time() - begun) / 60, time.process_time()
        keep(run, minutes=minutes, **line)
    return write
