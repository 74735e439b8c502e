"""Dropout on a CPU, with random numbers that cost a seventh: four from each 64 bits, where torch draws one by one.

    y = x m / (1 - p)                                    m: 0 with probability p, which is kept to 1/65536
    a = (softmax(s Q K^T + bias + mask) m / (1 - p)) V   attention with dropout, for which torch has no kernel on a CPU

Their order is another than torch's; they come from the same generator, and a training that goes on finds its state.

Without dropout torch has a kernel, whose backward takes some 15 ms a call in half precision however short the rows are,
where the products above take 3: it is left out there, too (see `pays`).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers.integrations.sdpa_attention import repeat_kv

from .casts import autocast_type
from .patch import patch

_STEPS = 2**16
SHORT = 256  # tokens up to which torch's kernel is slower in half precision, there and back


def _drawn(shape: torch.Size, p: float, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
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


def _thinned(tensor: torch.Tensor, kept: torch.Tensor | None, scale: float) -> torch.Tensor:
    return tensor if kept is None else (tensor * kept).mul_(scale)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, p: float) -> torch.Tensor:
        kept, ctx.scale = _drawn(x.shape, p, x.dtype)
        ctx.save_for_backward(kept)
        return _thinned(x, kept, ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        (kept,) = ctx.saved_tensors
        return _thinned(gradient, kept, ctx.scale), None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        mask: torch.Tensor | None,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        scores = torch.matmul(query, key.transpose(-1, -2)).mul_(scaling)
        if bias is not None:
            scores = scores.add_(bias)
        if mask is not None:
            scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores.add_(mask)
        weights = scores.softmax(-1)
        kept, ctx.scale = _drawn(weights.shape, p, weights.dtype) if p else (None, 1.0)
        ctx.scaling, ctx.bias = scaling, None if bias is None else bias.dtype
        ctx.save_for_backward(query, key, value, weights, kept)
        return torch.matmul(_thinned(weights, kept, ctx.scale), value)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, weights, kept = ctx.saved_tensors
        for_value = torch.matmul(_thinned(weights, kept, ctx.scale).transpose(-1, -2), gradient)
        for_weights = torch.matmul(gradient, value.transpose(-1, -2))
        if kept is not None:
            for_weights = for_weights.mul_(kept).mul_(ctx.scale)
        for_scores = torch._softmax_backward_data(for_weights, weights, -1, weights.dtype)
        # one for all rows of a group
        for_bias = for_scores.sum(0, keepdim=True, dtype=ctx.bias) if ctx.needs_input_grad[3] else None
        for_scores = for_scores.mul_(ctx.scaling)
        return (
            torch.matmul(for_scores, key),
            torch.matmul(for_scores.transpose(-1, -2), query),
            for_value,
            for_bias,
            None,
            None,
            None,
        )


def pays(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, length: int, p: float) -> bool:
    """Whether attention as above is faster than torch's own.

    Args:
        query, key, value: of all rows.
        length: of the longest row.
        p: of its dropout.
    """
    if query.device.type != "cpu":
        return False
    trained = torch.is_grad_enabled() and any(one.requires_grad for one in (query, key, value))
    half = (autocast_type(query.device) or query.dtype).itemsize == 2
    return bool(p) or (trained and half and length <= SHORT)


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """Stands in for transformers' sdpa where that pays; shapes and meaning are the same."""
    groups = getattr(module, "num_key_value_groups", 1)
    dtype = autocast_type(query.device) or query.dtype  # rotated queries and keys may be of another type than values
    query, key, value = query.to(dtype), repeat_kv(key, groups).to(dtype), repeat_kv(value, groups).to(dtype)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and attention_mask is None:
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    result = _Attention.apply(query, key, value, position_bias, attention_mask, scaling, dropout)  # type: ignore[no-untyped-call]
    return result.transpose(1, 2), None


def speed_up(modules: Iterable[nn.Module], undo: ExitStack) -> None:
    """Has dropout layers draw as above where they are given what is on a CPU, until `undo` is closed."""
    for module in modules:
        if knows(module) and "forward" not in vars(module) and 0 < module.p < 1:
            patch(module, "forward", partial(_forward, module, module.forward), undo)


def knows(module: nn.Module) -> TypeGuard[nn.Dropout]:
    """Whether a module may be sped up."""
    return type(module) is nn.Dropout


def _forward(module: nn.Dropout, own: Any, x: torch.Tensor) -> torch.Tensor:
    fast = module.training and x.device.type == "cpu" and x.is_floating_point() and not module.inplace
    result: torch.Tensor = _Dropout.apply(x, module.p) if fast else own(x)  # type: ignore[no-untyped-call]
    return result
