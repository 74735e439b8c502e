"""Memory of this process that is free: given back to the system, kept by the process for a while, or not yet there.

glibc gives what is free at the heap's end, and every block of more than 32 MiB, back to the system at once. A step of a
packed batch ends with little in memory, and the next one begins with pages that the system has to clear: with hidden
states of a BERT-base's size that is a good part of its time.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

# mallopt's names for its parameters, <malloc.h>
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEEP = {TRIM_THRESHOLD: -1, MMAP_MAX: 0}
# What glibc comes to by itself in a process that has freed a large block, and stays at.
OWN = {TRIM_THRESHOLD: 64 * 2**20, MMAP_THRESHOLD: 32 * 2**20, MMAP_MAX: 2**16}


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is glibc."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None


_library = _glibc()
_lock = threading.Lock()
_open = 0  # trainings that are running in this process


@contextmanager
def kept() -> Iterator[None]:
    """For as long as it is entered, memory that the main thread frees stays with the process; then it is given back.

    Processes that are forked meanwhile, such as a data loader's workers, find none of it, and allocate as ever. Where
    the user has set glibc's allocator by the environment nothing is done; another allocator in its place pays no heed.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        yield
        return
    process = os.getpid()
    _count(1)
    try:
        yield
    finally:
        if os.getpid() == process:  # a child that comes out of here has been reset
            _count(-1)
            if not _open:
                give_back()


def give_back() -> None:
    """Gives pages that hold nothing back to the system."""
    if _library:
        _library.malloc_trim(0)


def zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros that take memory only where something else is written, a page of 4 KiB at a time; torch's take it at once.

    Args:
        tensor: contiguous, on the CPU, of one number at least.
    """
    if sys.platform == "win32":
        made = mmap.mmap(-1, tensor.nbytes)
    else:
        made = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            made.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(made, dtype=tensor.dtype).resize_(tensor.shape)  # a view would hold a second tensor


def _count(more: int) -> None:
    global _open
    with _lock:
        _open += more
        _set(KEEP if _open else OWN)


def _set(parameters: Mapping[int, int]) -> None:
    if _library:
        for parameter, value in parameters.items():
            _library.mallopt(parameter, value)


def _before_fork() -> None:
    """What is free would be held twice: by the child as it was, by this process as it is written anew."""
    if _open:
        give_back()


def _in_child() -> None:
    global _open, _lock
    _lock = threading.Lock()
    if _open:
        _open = 0
        _set(OWN)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_child=_in_child)
