"""Changes for a while: a method of a layer, a function of torch, or the mode that a model is in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

from torch import nn


def patch(owner: nn.Module | ModuleType, name: str, value: Any, undo: ExitStack) -> None:
    """Replaces a method of a layer or a function of torch's; when `undo` is closed, what was there is there again."""
    own = vars(owner).get(name)  # others may have put one there too, as accelerate does
    if own is not None:
        undo.callback(setattr, owner, name, own)
    else:
        undo.callback(vars(owner).pop, name, None)  # Ctrl-C may come before it is there
    setattr(owner, name, value)


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
