"""How the C library hands out memory."""

import ctypes
import sys

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of glibc's malloc.h


def keep_freed_memory() -> None:
    """From here on, this process keeps the memory that it frees: the next tensor of that size is there at once.

    By default glibc hands large blocks back to the system, which fills every page with zeros before it gives it out again. A
    training step asks for the same gigabytes as the step before it: that can be a fifth of its time. The process holds its
    peak until it ends. C libraries without `mallopt` are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(MMAP_THRESHOLD, 2**30) or mallopt(MMAP_THRESHOLD, 2**25)  # older ones refuse more than 32 MB
