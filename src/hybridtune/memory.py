"""Measures the peak memory of a piece of work in this process."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

from . import heap


class PeakMemory:
    """Peak memory since this object was made, beyond what was held then: resident on the CPU, allocated on CUDA.

    On Linux the kernel's high-water mark (VmHWM) is reset first and heap pages that earlier work has freed are given
    back, so that trials in one process can be told apart. Elsewhere CPU memory is not measured.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        gc.collect()
        self._device, self._before = device, None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif device.type == "cpu" and sys.platform == "linux":
            self._before = _reset()

    def peak(self) -> int | None:
        """Bytes, or None where it cannot be measured."""
        if self._before is None:
            return None
        now = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else _status("VmHWM")
        return now - self._before


def _reset() -> int | None:
    try:
        heap.give_back()
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # a container that forbids it
        return None
    return _status("VmRSS")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
