"""What compiling takes is measured, and only that."""

import time

from manyform.ops.kernels import compiling


def test_seconds_of_compiling_and_of_nothing_else():
    import numba
    function = numba.njit(lambda x: x * x + 1)
    with compiling() as first:
        function(2.0)
        assert first.seconds == 0.0  # not known before the end
    with compiling() as again:
        function(2.0)
        time.sleep(0.01)
    assert first.seconds > 0.001
    assert again.seconds == 0.0
