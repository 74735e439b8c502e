"""Dropout on a CPU, with random numbers that cost a seventh: four from each 64 bits, where torch draws one by one.

    y = x m / (1 - p)        m: 0 with probability p, which is kept to 1/65536

Their order is another than torch's; they come from the same generator, and a training that goes on finds its state.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

_STEPS = 2**16


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        dropped = round(p * _STEPS)
        bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = (bits.view(torch.int16)[: x.numel()] >= dropped - _STEPS // 2).view(x.shape)
        ctx.save_for_backward(kept)
        ctx.scale = _STEPS / (_STEPS - dropped)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None


def speed_up(modules: Iterable[nn.Module], undo: ExitStack) -> None:
    """Has dropout layers draw as above where they are given what is on a CPU, until `undo` is closed."""
    for module in modules:
        if type(module) is nn.Dropout and "forward" not in vars(module) and 0 < module.p < 1:
            undo.callback(delattr, module, "forward")
            module.forward = partial(_forward, module, module.forward)  # type: ignore[method-assign]


def _forward(module: nn.Dropout, own: Any, x: torch.Tensor) -> torch.Tensor:
    fast = module.training and x.device.type == "cpu" and x.is_floating_point() and not module.inplace
    result: torch.Tensor = _Dropout.apply(x, module.p) if fast else own(x)  # type: ignore[no-untyped-call]
    return result
