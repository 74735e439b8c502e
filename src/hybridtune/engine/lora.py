"""LoRA on a frozen matrix, in the cheaper order of multiplication and without what autograd would save.

    y = x W^T + b + s (x A^T) B^T        two thin products for each token, or
    y = x (W + s B A)^T + b              one product of the thin matrices for all of them

The second is taken in 32 bits, and as soon as it is cheaper: from out * in / (out + in) tokens on. Gradients follow the
same choice: that of x needs one product with W + s B A, and those of A and B are thin either way (RunLoRA: Cherniuk et
al. 2023, arXiv 2312.03415). x A^T, which is thin, is kept by the first; the second computes it in the backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeGuard

import torch
from peft.tuners.lora.layer import Linear
from torch import nn
from torch.nn import functional

from .casts import Casts, autocast_type
from .patch import patch


class _Product(torch.autograd.Function):
    """y above, for W and b that are not trained."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        # in half precision the sum would round away what A and B add to W
        exact = weight.dtype in (torch.float32, torch.float64)
        ctx.scaling, ctx.folds = scaling, exact and rows.shape[0] * sum(weight.shape) > weight.numel()
        if ctx.folds:
            ctx.save_for_backward(x, weight, down, up)
            return functional.linear(x, torch.addmm(weight, up, down, alpha=scaling), bias)
        low = rows @ down.T
        ctx.save_for_backward(x, weight, down, up, low)
        y = functional.linear(rows, weight, bias).addmm_(low, up.T, alpha=scaling)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        x, weight, down, up, *low = ctx.saved_tensors
        rows, out = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        if not low or torch.is_grad_enabled():  # whose own gradients are asked for, and what is kept has none
            low = [rows @ down.T]
        thin, for_x = out @ up, None
        if ctx.needs_input_grad[0]:
            whole = torch.addmm(weight, up, down, alpha=ctx.scaling) if ctx.folds else weight
            for_x = out @ whole
            for_x = (for_x if ctx.folds else for_x.addmm_(thin, down, alpha=ctx.scaling)).view_as(x)
        return for_x, None, None, _times(ctx.scaling, thin.T, rows), _times(ctx.scaling, out.T, low[0]), None


def _times(factor: float, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """factor * left @ right, in one call."""
    nothing = left.new_empty(())
    return torch.addmm(nothing, left, right, beta=0, alpha=factor)  # of which nothing is read


def speed_up(modules: Iterable[nn.Module], undo: ExitStack, casts: Casts | None = None) -> None:
    """Has PEFT's plain LoRA layers compute by the formula above, until `undo` is closed.

    Args:
        modules: of a model; others than LoRA's are left alone.
        undo: takes it back.
        casts: copies in the type that autocast computes in.
    """
    for module in modules:
        if knows(module) and "forward" not in vars(module):
            patch(module, "forward", partial(_forward, module, module.forward, casts), undo)


def knows(module: nn.Module) -> TypeGuard[Linear]:
    """Whether a module may be such a layer; `_plain` says in every forward whether it is one now."""
    return type(module) is Linear


def _plain(layer: Linear, x: torch.Tensor) -> bool:
    """Whether a layer is nothing more than the formula: no variant such as DoRA, no other adapter, no hook inside, one
    x for A and W, and one type."""
    base, names = layer.base_layer, layer.active_adapters
    if type(base) is not nn.Linear or layer.merged or layer.disable_adapters or layer.fan_in_fan_out:
        return False
    if len(names) != 1 or names[0] not in layer.lora_A or layer.lora_variant:
        return False
    dropout = layer.lora_dropout[names[0]]
    if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p:
        return False
    thin = (layer.lora_A[names[0]], layer.lora_B[names[0]])
    mixed = {x.dtype, *(one.weight.dtype for one in (base, *thin))} != {x.dtype}
    if mixed and autocast_type(x.device) is None:
        return False
    hooked = any(one._forward_hooks or one._forward_pre_hooks for one in (base, *thin))
    trained = base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad)
    return not hooked and not trained and all(one.bias is None for one in thin)


def _forward(layer: Linear, own: Any, casts: Casts | None, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args or kwargs or not _plain(layer, x):
        result: torch.Tensor = own(x, *args, **kwargs)
        return result
    name, base, dtype = layer.active_adapters[0], layer.base_layer, autocast_type(x.device)
    thin = [layer.lora_A[name].weight, layer.lora_B[name].weight]
    tensors = [x, base.weight, base.bias, *thin]
    if dtype is not None:
        if casts:
            thin = [casts.trained(one, dtype) for one in thin]
            tensors = [casts.given(x, dtype), *casts.frozen(base, dtype), *thin]
        tensors = [tensor if tensor is None else tensor.to(dtype) for tensor in tensors]
    with torch.autocast(x.device.type, enabled=False):
        product: torch.Tensor = _Product.apply(*tensors, layer.scaling[name])  # type: ignore[no-untyped-call]
    return product
