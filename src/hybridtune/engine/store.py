"""Keeps hidden states of rows: in memory up to a limit, in unnamed files beyond it, and no more than that."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from dataclasses import dataclass, field

import psutil
import torch

SEGMENT = 2**26  # bytes that are reserved at a time
SHARE = 8  # of the memory and of the disk space that are free: at most one in so many bytes


@dataclass
class Limits:
    """How much may be kept.

    Attributes:
        memory, disk: in bytes; by default a part of what is free.
    """

    memory: int = field(default_factory=lambda: psutil.virtual_memory().available // SHARE)
    disk: int = field(default_factory=lambda: shutil.disk_usage(tempfile.gettempdir()).free // SHARE)


@dataclass
class Store:
    """Rows of vectors by keys.

    Attributes:
        limits: what is left of them.
    """

    limits: Limits
    _rows: dict[bytes, torch.Tensor] = field(default_factory=dict)
    _segment: torch.Tensor | None = None
    _used: int = 0
    full: bool = False

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
                stacklevel=2,
            )
            return None
        self._used += count
        return self._segment[self._used - count : self._used]

    def _grow(self, count: int, dtype: torch.dtype) -> torch.Tensor | None:
        size = count * dtype.itemsize
        if size <= self.limits.memory:
            self.limits.memory -= size
            return torch.empty(count, dtype=dtype)
        if size <= self.limits.disk:
            self.limits.disk -= size
            with tempfile.NamedTemporaryFile(prefix="hybridtune-") as file:  # without a name, it goes with the process
                return torch.from_file(file.name, shared=True, size=count, dtype=dtype)
        return None
