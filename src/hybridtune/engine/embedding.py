"""Gradients of embedding tables on a CPU: added row by row to what is there, not made anew as whole tables.

    dW[i] = sum over the places t with token i of dy[t]

A batch has a few thousand tokens, a table up to a quarter of a million rows. Autograd makes a table of zeros in every
backward, writes the rows into it, and adds it to what there is or gives it back after the update; the pages of memory
alone that are new each time cost a tenth of a step of a model of 30,000 tokens. Which rows have a gradient is known
then, too: only these are cleared, clipped and, with all that ever had one, changed (see `adamw`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from .. import heap
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
        self._touched: dict[nn.Parameter, list[torch.Tensor]] = {}  # rows that have been added to
        self._version: dict[nn.Parameter, int] = {}  # of the gradient, when that was done

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
        for kept in (self._memory, self._touched, self._version):
            kept.clear()

    def rows(self, weight: nn.Parameter) -> torch.Tensor | None:
        """The rows of a table outside of which its gradient is zero, ascending; None where somebody else wrote to it.

        What is written past torch's count of changes, through `.data`, is not seen.
        """
        kept = self._memory.get(weight)
        if kept is None or weight.grad is not kept or kept._version != self._version[weight]:
            return None
        return self._rows(weight)

    def _rows(self, weight: nn.Parameter) -> torch.Tensor:
        rows: torch.Tensor = torch.cat(self._touched[weight]).unique()  # type: ignore[no-untyped-call]
        return rows

    @contextmanager
    def compact(self, parameters: Iterable[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
        """Parameters for what looks at all gradients: of a table stand there those of its rows that have one.

        What becomes of these becomes of the table's.
        """
        given, apart = list[torch.Tensor](), []
        for weight in parameters:
            rows, table = self.rows(weight), weight.grad
            if rows is None or table is None:
                given.append(weight)
                continue
            found = table.index_select(0, rows)
            given.append(torch.empty_like(found))
            given[-1].grad = found
            apart.append((weight, table, rows, found))
        yield given
        for weight, table, rows, found in apart:
            table.index_copy_(0, rows, found)
            self._version[weight] = table._version

    def add(self, weight: nn.Parameter, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Adds to the gradient that is there, or to zeros.

        Args:
            weight: the table.
            ids: [places] the rows of the table that are added to.
            rows: [places, width] what is added.
        """
        if weight.grad is None:
            weight.grad = self._zeros(weight)
            self._touched[weight] = []
        elif self.rows(weight) is None:
            self._touched[weight] = [torch.arange(len(weight))]
        table = self._memory[weight] = weight.grad
        table.index_add_(0, ids, rows.to(table.dtype))
        self._touched[weight].append(ids)
        self._version[weight] = table._version

    def _zeros(self, weight: nn.Parameter) -> torch.Tensor:
        kept, version = self._memory.pop(weight, None), self._version.get(weight)
        if kept is not None and (kept.shape, kept.dtype, kept.device) == (weight.shape, weight.dtype, weight.device):
            held = torch._C._storage_Use_Count(kept.untyped_storage()._cdata)  # by a view, say
            if sys.getrefcount(kept) == held == _OURS:
                by_rows = kept._version == version
                return kept.index_fill_(0, self._rows(weight), 0) if by_rows else kept.zero_()
        return zeros_like(weight)

    def _look_up(self, module: Any, input: torch.Tensor) -> torch.Tensor:
        rows: torch.Tensor = _Rows.apply(input, module.weight, module.padding_idx, self)  # type: ignore[no-untyped-call]
        return rows


def zeros_like(tensor: torch.Tensor) -> torch.Tensor:
    """Zeros that take memory only where something else is written; torch's own are all written at once."""
    flat = torch.frombuffer(heap.zeros(tensor.nbytes), dtype=tensor.dtype)
    return flat.resize_(tensor.shape)  # a view would hold a second tensor


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
        ctx.tables.add(ctx.weight, ids, rows)
        return None, None, None, None
