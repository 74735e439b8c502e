"""Attention over all rows of a packed row in one call, by a kernel that takes their bounds: on CUDA, in half precision.

flash-attn's kernel where it is installed, or torch's own. What neither can do (windows, biases, cross-attention, wide
heads) goes group by group as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from .casts import compute_type
from .layout import Layout

WIDEST, MULTIPLE, CAPABILITY = 256, 8, (8, 0)  # heads that the kernels take, and GPUs that they run on

# query [tokens, heads, width]; key, value [tokens, key heads, width], where heads may share them; bounds [rows + 1];
# tokens of the longest row; causal; scaling; dropout
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, bool, float, float], torch.Tensor]


def kernel_for(query: torch.Tensor, value: torch.Tensor) -> Kernel | None:
    """A kernel for these tensors; None where there is none."""
    width, dtype = query.shape[-1], compute_type(query)
    fits = width == value.shape[-1] <= WIDEST and width % MULTIPLE == 0
    if query.device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or not fits:
        return None
    if torch.cuda.get_device_capability(query.device) < CAPABILITY:
        return None
    return _flash_attn() or _torch


def attention(
    kernel: Kernel,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    layout: Layout,
    causal: bool,
    scaling: float | None,
    dropout: float,
) -> torch.Tensor:
    """Runs it; gives [1, tokens, heads, width].

    Args:
        kernel: found by `kernel_for`.
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
    return kernel(q, k, v, layout.bounds, layout.longest, causal, scaling, dropout).unsqueeze(0)


def _torch(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    causal: bool,
    scaling: float,
    dropout: float,
) -> torch.Tensor:
    """What torch's `varlen_attn` and nested tensors come to in the end.

    The former has no dropout, and costs a third of a millisecond of the host's time a call; the latter take twice the
    time of a step.
    """
    kernel: Any = torch.ops.aten._flash_attention_forward
    result: torch.Tensor = kernel(
        q, k, v, bounds, bounds, longest, longest, dropout, causal, return_debug_mask=False, scale=scaling
    )[0]
    return result


@cache
def _flash_attn() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def run(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        bounds: torch.Tensor,
        longest: int,
        causal: bool,
        scaling: float,
        dropout: float,
    ) -> torch.Tensor:
        result: Any = flash_attn_varlen_func(
            q, k, v, bounds, bounds, longest, longest, dropout_p=dropout, softmax_scale=scaling, causal=causal
        )
        return result  # type: ignore[no-any-return]

    return run
