"""Puts something in the place of a module's method for a while."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import nn


def patch(module: nn.Module, name: str, value: Any, undo: ExitStack) -> None:
    """Replaces a method of one module; when `undo` is closed, what was there before is there again."""
    own = vars(module).get(name)  # others may have put one there too, as accelerate does
    undo.callback(setattr, module, name, own) if own is not None else undo.callback(delattr, module, name)
    setattr(module, name, value)
