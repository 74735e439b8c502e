"""What the methods that add modules of our own have in common: widths of matrices, and taking hooks off again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from torch import nn

from ..errors import MethodError


def width_of(matrix: nn.Module, side: Literal["in", "out"]) -> int:
    """Width that goes in or out of a matrix: nn.Linear, GPT-2's Conv1D, or PEFT's layer on either.

    Raises:
        MethodError: it is another kind of module.
    """
    for name in (f"{side}_features", {"in": "nx", "out": "nf"}[side]):
        if hasattr(matrix, name):
            return int(getattr(matrix, name))
    raise MethodError(f"the width of a {type(matrix).__name__} is unknown")


def unhook(modules: Iterable[nn.Module], owner: nn.Module) -> None:
    """Takes the hooks off that are bound methods of a module; handles would not survive a copy of the model."""
    for module in modules:
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is owner]:
                del hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
