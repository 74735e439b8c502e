"""Dropout on a CPU, with random numbers that cost a seventh: four from each 64 bits, where torch draws one by one.

    y = x m / (1 - p)    m: 0 with probability p, which is kept to 1/65536

Their order is another than torch's; they come from the same generator, and a training that goes on finds its state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import Any

import torch
from torch.nn import functional

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
        return _scaled(x, kept, ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        return _scaled(gradient, kept, ctx.scale), None


def _scaled(x: torch.Tensor, kept: torch.Tensor, scale: float) -> torch.Tensor:
    """scale * x * kept, in one pass."""
    return torch.addcmul(x.new_zeros(()), x, kept, value=scale)


_torchs, _entered, _lock = functional.dropout, 0, Lock()


@contextmanager
def fast() -> Iterator[None]:
    """Has torch's dropout draw as above from what is on a CPU, while it is entered, in whatever order others leave it.

    The function is replaced, which layers call as well: BART and its kin have no layers for it. A mode of torch's
    functions would not do: it is off in backwards, where layers may be computed again.
    """
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(more: int) -> None:
    global _entered, _torchs
    with _lock:
        if not _entered:  # which may be another's by now
            _torchs, functional.dropout = functional.dropout, _dropout
        _entered += more
        if not _entered and functional.dropout is _dropout:
            functional.dropout = _torchs


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    draws = training and 0 < p < 1 and input.device.type == "cpu" and input.is_floating_point() and not inplace
    if not draws:
        return _torchs(input, p, training, inplace)
    result: torch.Tensor = _Dropout.apply(input, p)  # type: ignore[no-untyped-call]
    return result
