"""Keep the memory of large tensors in the process from step to step."""

from __future__ import annotations

import ctypes
import functools
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h of the GNU C library


@functools.cache
def keep_large_blocks() -> bool:
    """Ask the GNU C library not to give freed blocks back to the system; True if it agreed.

    By default it maps every block over some megabytes afresh and unmaps it when it is freed, so
    each step pays for its temporaries page by page: writing a new 32 MB tensor took three times as
    long as writing into kept memory. Other systems' allocators keep their pages, and nothing is
    done there.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return False
    most = (1 << 31) - 1, 32 << 20  # older versions take no more than 32 MB
    return (any(mallopt(_MMAP_THRESHOLD, size) == 1 for size in most)
            and mallopt(_TRIM_THRESHOLD, most[0]) == 1)
