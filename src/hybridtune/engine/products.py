"""Attention on a CPU by plain products, where they are faster than torch's kernel or do what it cannot.

    a = (softmax(s Q K^T + bias + mask) m / (1 - p)) V    m: 0 with probability p (see `dropout`)

With dropout torch has no kernel there. Without it has one, which in half precision takes longer than the products for
short rows: up to twice as long forwards, several times backwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import dropout
from .casts import compute_type

SHORT = 256  # tokens up to which torch's kernel is slower in half precision


class _Attention(torch.autograd.Function):
    """Of [heads * rows, length, head width] each; bias and mask are [heads or 1, rows or 1, queries, keys]."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        mask: torch.Tensor | None,
        rows: int,
        scaling: float,
        p: float,
    ) -> torch.Tensor:
        weights = _weights(query, key, bias, mask, rows, scaling)
        kept, ctx.scale = dropout.drawn(weights.shape, p, weights.dtype) if p else (None, 1.0)
        ctx.rows, ctx.scaling = rows, scaling
        ctx.save_for_backward(query, key, value, bias, mask, weights, kept)
        return _product(weights if kept is None else weights * kept, value, ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        query, key, value, bias, mask, weights, kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a derivative of this is asked for, and the weights that are kept have none
            weights = _weights(query, key, bias, mask, ctx.rows, ctx.scaling)
        thinned = weights if kept is None else weights * kept
        for_value = _product(thinned.transpose(1, 2), gradient, ctx.scale)
        for_weights = _product(gradient, value.transpose(1, 2), ctx.scale)
        if kept is not None:
            for_weights = for_weights.mul_(kept)
        for_scores = torch._softmax_backward_data(for_weights, weights, -1, weights.dtype)
        for_bias = None
        if ctx.needs_input_grad[3]:  # one for all rows of a group
            for_bias = torch.unflatten(for_scores, 0, (-1, ctx.rows)).sum(1, keepdim=True, dtype=bias.dtype)
        return (
            _product(for_scores, key, ctx.scaling),
            _product(for_scores.transpose(1, 2), query, ctx.scaling),
            for_value,
            for_bias,
            *[None] * 4,
        )


def _weights(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor | None,
    mask: torch.Tensor | None,
    rows: int,
    scaling: float,
) -> torch.Tensor:
    """The softmax above."""
    scores = _product(query, key.transpose(1, 2), scaling)
    by_rows = torch.unflatten(scores, 0, (-1, rows))
    if bias is not None:
        by_rows.add_(bias)
    if mask is not None:
        by_rows.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else by_rows.add_(mask)
    return scores.softmax(-1)


def _product(left: torch.Tensor, right: torch.Tensor, factor: float) -> torch.Tensor:
    """factor * left @ right, without a pass for the factor."""
    empty = left.new_empty(len(left), left.shape[1], right.shape[2])
    return empty.baddbmm_(left, right, beta=0, alpha=factor)


def pays(query: torch.Tensor, key: torch.Tensor, p: float) -> bool:
    """Whether attention as above is faster than torch's own.

    Args:
        query, key: [rows, heads, length, head width].
        p: of its dropout.
    """
    if query.device.type != "cpu":
        return False
    half = compute_type(query).itemsize == 2
    return bool(p) or (half and max(query.shape[2], key.shape[2]) <= SHORT)


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
    groups, rows = getattr(module, "num_key_value_groups", 1), len(query)
    dtype = compute_type(query)  # rotated queries and keys may be of another type than values
    states = [one.to(dtype).transpose(0, 1) for one in (query, key, value)]  # as they lie where rows were padded
    if groups > 1:
        states[1:] = [one.repeat_interleave(groups, 0) for one in states[1:]]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if causal and attention_mask is None:
        attention_mask = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool).tril()
    bias, mask = (one if one is None else one.transpose(0, 1) for one in (position_bias, attention_mask))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    flat = [one.flatten(0, 1) for one in states]
    result: torch.Tensor = _Attention.apply(*flat, bias, mask, rows, scaling, dropout)  # type: ignore[no-untyped-call]
    return torch.unflatten(result, 0, (-1, rows)).permute(1, 2, 0, 3), None
