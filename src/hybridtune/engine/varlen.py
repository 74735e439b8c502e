"""Attention over all rows of a packed row in one call, by a kernel that takes their bounds: on CUDA, in half precision.

What the kernel cannot do (windows, biases, cross-attention, wide heads) goes group by group as ever.
"""

from __future__ import annotations

from typing import Any

import torch

from .casts import compute_type
from .layout import Layout

WIDEST, MULTIPLE, CAPABILITY = 256, 8, (8, 0)  # heads that it takes, and GPUs that it runs on


def fits(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the kernel takes these tensors, here."""
    width, dtype = query.shape[-1], compute_type(query)
    if query.device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if not width == value.shape[-1] <= WIDEST or width % MULTIPLE:
        return False
    capable = torch.cuda.get_device_capability(query.device) >= CAPABILITY
    return capable and torch.backends.cuda.is_flash_attention_available()


def attention(
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layout: Layout,
    causal: bool,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Runs it; gives [1, tokens, heads, width].

    Args:
        states: queries [1, heads, tokens, width], keys and values [1, key heads, tokens, width], packed.
        layout: of the packed row.
        causal: whether a token sees itself and what is before it, or the whole row.
        scaling: of the scores; None: by the width.
        dropout: probability.
    """
    query = states[0]
    dtype = compute_type(query)  # rotated queries and keys may be of another type than values
    q, k, v = (tensor.to(dtype).squeeze(0).transpose(0, 1) for tensor in states)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return flash(q, k, v, layout.bounds, layout.longest, causal, scaling, dropout).unsqueeze(0)


def flash(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    causal: bool,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """Flash attention as torch has it. Gives [tokens, heads, width].

    Its `varlen_attn`, which calls the same, has no dropout, and costs a third of a millisecond of the host's time a
    call; nested tensors, which lead to it too, twice the time of a step.

    Args:
        q: [tokens, heads, width].
        k, v: [tokens, key heads, width]; several heads may share one.
        bounds: [rows + 1], 32-bit: where rows begin, and the last one ends.
        longest: tokens of the longest row.
        causal: whether a token sees itself and what is before it, or the whole row.
        scaling: of the scores.
        dropout: probability.
    """
    kernel: Any = torch.ops.aten._flash_attention_forward
    result: torch.Tensor = kernel(
        q, k, v, bounds, bounds, longest, longest, dropout, causal, return_debug_mask=False, scale=scaling
    )[0]
    return result
