"""Changes a model for a while: a method of a module, or the mode that it is in."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def patch(module: nn.Module, name: str, value: Any, undo: ExitStack) -> None:
    """Replaces a method of one module; when `undo` is closed, what was there before is there again."""
    own = vars(module).get(name)  # others may have put one there too, as accelerate does
    if own is not None:
        undo.callback(setattr, module, name, own)
    else:
        undo.callback(vars(module).pop, name, None)  # Ctrl-C may come before it is there
    setattr(module, name, value)


def alone(model: nn.Module) -> threading.RLock:
    """To be entered by whoever opens or starts a model's engine, several times by a thread: other threads wait."""
    return _LOCKS.setdefault(model, threading.RLock())


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """A model without dropout, and afterwards each module as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
