"""Weights that do not change cast to the type of autocast once, instead of in every forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn import functional as F

from .patch import patch


def autocast_type(device: torch.device) -> torch.dtype | None:
    """What autocast computes in here; None where it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def compute_type(tensor: torch.Tensor) -> torch.dtype:
    """What a tensor is computed with in here: autocast's type, or its own."""
    return autocast_type(tensor.device) or tensor.dtype


def written(tensor: torch.Tensor) -> tuple[int, int]:
    """Another pair after every write, but for those through `.data`, which nothing tells."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


class Casts:
    """Copies of a model's linear weights in the type that autocast would cast them to in every forward.

    The weights themselves stay as they are: while `open()` is entered, forwards compute with the copies, and nothing
    else sees them. A checkpoint in the middle of a stage, a fingerprint, a merge and the user's callbacks find the fp32
    originals, of which nothing has to be given back. A copy of what was loaded anew, or trained for a while, is made
    again.

    Copies take half the bytes of the fp32 weights, beside them, for as long as this object lives. Plain autocast has as
    much from every forward to its backward, which needs the cast weights.

    Args:
        model: as a stage has it.
        still: whether nothing is trained meanwhile: then weights that could be are copied as frozen ones are. Not every
            optimizer lets a write be seen.
    """

    def __init__(self, model: nn.Module, still: bool = False) -> None:
        self._still = still
        self._keeps = True
        self._linear = [
            module
            for module in model.modules()
            if type(module).forward is nn.Linear.forward and "weight" in module._parameters  # no parametrization
        ]
        # PEFT merges through `.data`
        self._adapted = {layer.base_layer: layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)}
        self._copies: dict[nn.Module, tuple[Any, torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """For forwards and, where layers are computed again in them, their backwards."""
        with ExitStack() as undo:
            for module in self._linear:
                if "forward" not in vars(module):
                    patch(module, "forward", partial(self._run, module), undo)
            yield

    def give_up(self) -> bool:
        """Drops all copies and keeps none from now on, where memory is short; whether there were any."""
        had, self._keeps = bool(self._copies), False
        self._copies.clear()
        return had

    def weight(self, linear: nn.Linear, dtype: torch.dtype) -> torch.Tensor:
        """A layer's weight, without a gradient, in the type that autocast computes in."""
        weight, adapted = linear.weight, self._adapted.get(linear)
        state = written(weight), tuple(adapted.merged_adapters) if adapted else ()
        known = self._copies.get(linear)
        if known is None or known[0] != state or known[-1].dtype != dtype:
            original = weight.detach()  # kept, so that no other tensor gets its place in memory
            known = state, original, original.to(dtype)
            if self._keeps:
                self._copies[linear] = known
        return known[-1]

    def _run(self, linear: Any, inputs: torch.Tensor) -> torch.Tensor:
        weight, dtype = linear.weight, autocast_type(inputs.device)
        trained = weight.requires_grad and not self._still
        if dtype is None or trained or weight.dtype != torch.float32:
            self._copies.pop(linear, None)
            return nn.Linear.forward(linear, inputs)
        return F.linear(inputs, self.weight(linear, dtype), linear.bias)
