"""Keeps hidden states of rows: in memory up to a limit, in unnamed files beyond it, and no more than that."""

from __future__ import annotations

import functools
import shutil
import tempfile
import warnings
import weakref
from dataclasses import dataclass, field

import psutil
import torch

from ..errors import HybridtuneWarning

SEGMENT = 2**26  # bytes that are reserved at a time
SHARE = 8  # of the memory and of the disk space that are free: at most one in so many bytes


@dataclass
class Limits:
    """How much may be kept by all stores that share it; those used longest ago make room for others.

    Attributes:
        memory, disk: bytes that are left; at first a part of what is free.
    """

    memory: int = field(default_factory=lambda: psutil.virtual_memory().available // SHARE)
    disk: int = field(default_factory=lambda: shutil.disk_usage(tempfile.gettempdir()).free // SHARE)
    _stores: list[weakref.ref[Store]] = field(default_factory=list)  # the one used longest ago first

    def use(self, store: Store) -> None:
        """A store is used from now on: the others go first."""
        self._stores = [known for known in self._stores if known() not in (None, store)] + [weakref.ref(store)]

    def evict(self, asking: Store) -> bool:
        """Empties the store that was used longest ago; False where none is left but the one that asks."""
        for known in self._stores:
            store = known()
            if store is not None and store is not asking and store.taken.any:
                store.clear()
                return True
        return False


@functools.cache
def of_process() -> Limits:
    """The limits of this process, for all that is kept in it."""
    return Limits()


@dataclass
class Taken:
    """Bytes that a store has of its limits."""

    memory: int = 0
    disk: int = 0

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self.memory or self.disk)

    def give_back(self, limits: Limits) -> None:
        """For others."""
        limits.memory, limits.disk = limits.memory + self.memory, limits.disk + self.disk
        self.memory = self.disk = 0


class Store:
    """Rows of vectors by keys.

    Args:
        limits: that it shares with others.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.taken, self.full = limits, Taken(), False
        self._rows: dict[bytes, torch.Tensor] = {}
        self._segment: torch.Tensor | None = None
        self._used = 0
        weakref.finalize(self, self.taken.give_back, limits)

    def clear(self) -> None:
        """Forgets all rows, and gives their room back."""
        self._rows.clear()
        self._segment, self.full = None, False
        self.taken.give_back(self.limits)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: bytes) -> bool:
        return key in self._rows

    def get(self, key: bytes) -> torch.Tensor:
        """The row of a key, [tokens, width]."""
        return self._rows[key]

    def put(self, key: bytes, row: torch.Tensor) -> bool:
        """Keeps a copy of a row [tokens, width]; False where there is no room left."""
        place = self._reserve(row.numel(), row.dtype)
        if place is None:
            return False
        self._rows[key] = place.view(row.shape).copy_(row)
        return True

    def _reserve(self, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        if self.full:
            return None
        if self._segment is None or self._used + count > len(self._segment):
            self._segment, self._used = self._grow(max(SEGMENT // dtype.itemsize, count), dtype), 0
        if self._segment is None:
            self.full = True
            warnings.warn(
                f"engine: no room to keep more rows ({len(self)} are kept): the others are computed every time",
                category=HybridtuneWarning,
                stacklevel=2,
            )
            return None
        self._used += count
        return self._segment[self._used - count : self._used]

    def _grow(self, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        size = count * dtype.itemsize
        self.limits.use(self)
        while size > max(self.limits.memory, self.limits.disk):
            if not self.limits.evict(self):
                return None
        if size <= self.limits.memory:
            self.limits.memory -= size
            self.taken.memory += size
            return torch.empty(count, dtype=dtype)
        self.limits.disk -= size
        self.taken.disk += size
        with tempfile.NamedTemporaryFile(prefix="hybridtune-") as file:  # without a name, it goes with the process
            return torch.from_file(file.name, shared=True, size=count, dtype=dtype)
