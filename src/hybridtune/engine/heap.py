"""Memory that a training on a CPU frees and asks for again in every step, kept by the process meanwhile.

glibc gives what is free at the heap's end, and every block of more than 32 MiB, back to the system at once. A step of a
packed batch ends with little in memory, and the next one begins with pages that the system has to clear: with hidden
states of a BERT-base's size that is a good part of its time.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt's names for its parameters, <malloc.h>
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEEP = {TRIM_THRESHOLD: -1, MMAP_MAX: 0}
# What glibc comes to by itself in a process that has freed a large block, and stays at.
OWN = {TRIM_THRESHOLD: 64 * 2**20, MMAP_THRESHOLD: 32 * 2**20, MMAP_MAX: 2**16}

_open = 0  # trainings that are running in this process


@contextmanager
def kept() -> Iterator[None]:
    """For as long as it is entered, freed memory stays with the process; afterwards it is given back.

    Where another allocator is in the place of glibc's, or the user has set glibc's by the environment, nothing is done.
    """
    global _open
    glibc = None if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ) else _glibc()
    if glibc is None:
        yield
        return
    _open += 1
    try:
        for parameter, value in KEEP.items():
            glibc.mallopt(parameter, value)
        yield
    finally:
        _open -= 1
        if not _open:
            for parameter, value in OWN.items():
                glibc.mallopt(parameter, value)
            glibc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") and hasattr(library, "malloc_trim") else None
