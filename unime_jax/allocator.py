"""The C library's allocator, which keeps what is freed; without glibc nothing is done."""

import contextlib
import ctypes
import os

_M_ARENA_MAX = -8  # malloc.h


def bound_arenas() -> None:
    """Has all threads share an arena for four cores, two at least; call it before they are started.

    glibc gives each thread one of its own, which keeps what was freed in it. On two cores `embed`
    of the newcomer's model takes 0.85 GB at most that way, and 0.75 with two; a training of 2,000
    steps grows by 4 MB per 1,000, and by 0.2. What the user has set stays.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if "MALLOC_ARENA_MAX" in os.environ or "glibc.malloc.arena_max" in tunables:
        return
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, max(2, (os.cpu_count() or 1) // 4))


def give_back() -> None:
    """Returns to the system what is free, in tens of milliseconds."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
