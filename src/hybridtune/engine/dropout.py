"""Dropout on a CPU, with random numbers that cost a seventh: four from each 64 bits, where torch draws one by one.

    y = x m / (1 - p)    m: 0 with probability p, which is kept to 1/65536

Their order is another than torch's; they come from the same generator, and a training that goes on finds its state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_STEPS = 2**16


def drawn(shape: torch.Size, p: float, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """What is kept as ones and zeros, and the factor on it.

    They are 16-bit floats whose bits are made as integers: torch compares into Booleans, and multiplies with them, at
    a fraction of the speed. They are of the type that they are multiplied with where that has 16 bits, else bfloat16.
    """
    dropped, count = min(round(p * _STEPS), _STEPS - 1), shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = bits.view(torch.int16)[:count].view(shape).ge_(dropped - _STEPS // 2)
    half = dtype if dtype.itemsize == 2 else torch.bfloat16
    one = int(torch.ones((), dtype=half).view(torch.int16))
    return kept.mul_(one).view(half), _STEPS / (_STEPS - dropped)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        kept, ctx.scale = drawn(x.shape, p, x.dtype)
        ctx.save_for_backward(kept)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None


class Dropout(TorchFunctionMode):
    """Has torch's dropout draw as above from what is on a CPU, while it is entered, in this thread.

    It stands before the function, which layers call as well: BART and its kin have no layers for it.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_dropout if func is functional.dropout else func)(*args, **(kwargs or {}))


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    fast = training and 0 < p < 1 and input.device.type == "cpu" and input.is_floating_point() and not inplace
    if not fast:
        return functional.dropout(input, p, training, inplace)
    result: torch.Tensor = _Dropout.apply(input, p)  # type: ignore[no-untyped-call]
    return result
