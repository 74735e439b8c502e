"""The progress bars of `datasets`, off for a while: of steps that hybridtune takes unasked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from datasets import are_progress_bars_disabled, config, disable_progress_bars, enable_progress_bars


@contextmanager
def no_bars() -> Iterator[None]:
    """Shows none within; afterwards all is as the user has it. His own HF_DATASETS_DISABLE_PROGRESS_BARS=0 counts."""
    if are_progress_bars_disabled() or config.HF_DATASETS_DISABLE_PROGRESS_BARS is False:
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
