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
from dataclasses import dataclass
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


@dataclass
class _Gradient:
    """A table's gradient, as it was left.

    Attributes:
        tensor: zero but in some rows.
        rows: these, in pieces; an empty list: none.
        version: torch's count of changes to it.
        clean: since then an optimizer has looked at it that writes nothing to it.
    """

    tensor: torch.Tensor
    rows: list[torch.Tensor]
    version: int
    clean: bool = False

    def is_of(self, weight: nn.Parameter) -> bool:
        """Whether it still is the gradient of this, and nobody else has written to it."""
        return weight.grad is self.tensor and self.tensor._version == self.version

    def united(self) -> torch.Tensor:
        """The rows in one piece, ascending."""
        if len(self.rows) != 1:
            nothing = torch.empty(0, dtype=torch.long)
            self.rows = [torch.cat([nothing, *self.rows]).unique()]  # type: ignore[no-untyped-call]
        return self.rows[0]


class Tables:
    """A model's embedding tables whose gradients are kept as memory from one update to the next.

    What was a gradient is set to zero in the backward after `zero_grad`, unless somebody still holds it. Only
    `backward` gives these gradients: `torch.autograd.grad` finds none. Somebody else's writing to them is seen by
    torch's count of changes, and not where it goes past that, through `.data`.

    Args:
        model: on a CPU, in one process: elsewhere whole tables cost little, or are what other processes wait for.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules: list[Any] = [module for module in model.modules() if _plain(module)]
        self._kept: dict[nn.Parameter, _Gradient] = {}

    def open(self, undo: ExitStack) -> None:
        """Has those that are trained look rows up so, until `undo` is closed."""
        self._kept = {weight: kept for weight, kept in self._kept.items() if weight.requires_grad}
        for module in self._modules:
            weight: nn.Parameter = module.weight
            hooked = weight._backward_hooks or weight._post_accumulate_grad_hooks or "forward" in vars(module)
            fits = weight.is_leaf and weight.device.type == "cpu" and weight.dtype.itemsize >= _EXACT
            plain = weight.is_contiguous() and weight.numel() > 0
            if weight.requires_grad and fits and plain and not hooked:
                patch(module, "forward", partial(self._look_up, module), undo)

    def forget(self) -> None:
        """Gives the memory back."""
        self._kept.clear()

    def rows(self, weight: nn.Parameter) -> torch.Tensor | None:
        """The rows of a table outside of which its gradient is zero, ascending; None where somebody else wrote to it.

        For an optimizer that writes nothing to gradients: after its step only these rows are cleared.
        """
        kept = self._kept.get(weight)
        if kept is None or not kept.is_of(weight):
            return None
        kept.clean = True
        return kept.united()

    @contextmanager
    def compact(self, parameters: Iterable[nn.Parameter]) -> Iterator[list[torch.Tensor]]:
        """Parameters for what looks at all gradients: of a table stand there those of its rows that have one.

        What becomes of these becomes of the table's.
        """
        given, apart = list[torch.Tensor](), []
        for weight in parameters:
            kept = self._kept.get(weight)
            if kept is None or not kept.is_of(weight):
                given.append(weight)
                continue
            found = kept.tensor.index_select(0, kept.united())
            given.append(torch.empty_like(found))
            given[-1].grad = found
            apart.append((kept, found))
        yield given
        for kept, found in apart:
            kept.tensor.index_copy_(0, kept.united(), found)
            kept.version = kept.tensor._version

    def add(self, weight: nn.Parameter, ids: torch.Tensor, rows: torch.Tensor) -> None:
        """Adds to the gradient that is there, or to zeros.

        Args:
            weight: the table.
            ids: [places] the rows of the table that are added to.
            rows: [places, width] what is added.
        """
        if weight.grad is None:
            weight.grad = self._zeros(weight)
            self._kept[weight] = _Gradient(weight.grad, [], weight.grad._version)
        kept = self._kept.get(weight)
        if kept is None or not kept.is_of(weight):
            kept = self._kept[weight] = _Gradient(weight.grad, [torch.arange(len(weight))], 0)
        kept.tensor.index_add_(0, ids, rows.to(kept.tensor.dtype))
        kept.rows.append(ids.unique())  # type: ignore[no-untyped-call]
        kept.version, kept.clean = kept.tensor._version, False

    def _zeros(self, weight: nn.Parameter) -> torch.Tensor:
        kept = self._kept.pop(weight, None)
        if kept is None:
            return heap.zeros_like(weight)
        table, rows = kept.tensor, kept.united() if kept.clean and kept.tensor._version == kept.version else None
        del kept
        if (table.shape, table.dtype, table.device) != (weight.shape, weight.dtype, weight.device):
            return heap.zeros_like(weight)
        held = torch._C._storage_Use_Count(table.untyped_storage()._cdata)  # by a view, say
        if not sys.getrefcount(table) == held == _OURS:
            return heap.zeros_like(weight)
        return table.zero_() if rows is None else table.index_fill_(0, rows, 0)

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
        ctx.tables.add(ctx.weight, ids, rows)
        return None, None, None, None
