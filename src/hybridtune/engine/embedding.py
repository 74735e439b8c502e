"""Gradients of embedding tables on a CPU: added row by row to what is there, not made anew as whole tables.

    dW[i] = sum over the places t with token i of dy[t]

A batch has a few thousand tokens, a table up to a quarter of a million rows. Autograd makes a table of zeros in every
backward, writes the rows into it, and adds it to what there is or gives it back after the update; the pages of memory
alone that are new each time cost a tenth of a step of a model of 30,000 tokens.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .patch import patch

_EXACT = 4  # bytes of a number: sums of many rows would stop growing in fewer
_OURS = 2  # references to a tensor and to its storage that nobody else holds, with those of the question itself


class Tables:
    """A model's embedding tables whose gradients are kept as memory from one update to the next.

    What was a gradient is set to zero in the backward after `zero_grad`, unless somebody still holds it. Only
    `backward` gives these gradients: `torch.autograd.grad` finds none.

    Args:
        model: on a CPU, in one process: elsewhere whole tables cost little, or are what other processes wait for.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[Any] = [module for module in model.modules() if _plain(module)]
        self._memory: dict[nn.Parameter, torch.Tensor] = {}

    def open(self, undo: ExitStack) -> None:
        """Has those that are trained look rows up so, until `undo` is closed."""
        self._memory = {weight: kept for weight, kept in self._memory.items() if weight.requires_grad}
        for module in self._modules:
            weight: nn.Parameter = module.weight
            hooked = weight._backward_hooks or weight._post_accumulate_grad_hooks or "forward" in vars(module)
            fits = weight.is_leaf and weight.device.type == "cpu" and weight.dtype.itemsize >= _EXACT
            if weight.requires_grad and fits and not hooked:
                patch(module, "forward", partial(self._look_up, module), undo)

    def forget(self) -> None:
        """Gives the memory back."""
        self._memory.clear()

    def gradient(self, weight: nn.Parameter) -> torch.Tensor:
        """What is added to: the gradient that is there, or zeros."""
        if weight.grad is None:
            weight.grad = self._zeros(weight)
        self._memory[weight] = weight.grad
        return weight.grad

    def _zeros(self, weight: nn.Parameter) -> torch.Tensor:
        kept = self._memory.pop(weight, None)
        if kept is not None and (kept.shape, kept.dtype, kept.device) == (weight.shape, weight.dtype, weight.device):
            held = torch._C._storage_Use_Count(kept.untyped_storage()._cdata)  # by a view, say
            if sys.getrefcount(kept) == held == _OURS:
                return kept.zero_()
        return torch.zeros_like(weight, requires_grad=False)

    def _look_up(self, module: Any, input: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = _Rows.apply(input, module.weight, module.padding_idx, self)  # type: ignore[no-untyped-call]
        return rows


def _plain(module: nn.Module) -> bool:
    """Whether a module is torch's own lookup, with nothing else to do."""
    if type(module).forward is not nn.Embedding.forward or "weight" not in module._parameters:
        return False
    return not (module.sparse or module.scale_grad_by_freq or module.max_norm is not None)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: nn.Parameter, padding: int | None, tables: Tables) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding, ctx.tables = weight, padding, tables
        return functional.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None, None]:  # type: ignore[override]
        ids, rows = ctx.saved_tensors[0].reshape(-1), gradient.reshape(-1, gradient.shape[-1])
        if ctx.padding is not None:
            real = ids != ctx.padding
            if not real.all():
                ids, rows = ids[real], rows[real]
        table = ctx.tables.gradient(ctx.weight)
        table.index_add_(0, ids, rows.to(table.dtype))
        return None, None, None, None
