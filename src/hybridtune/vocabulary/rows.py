"""Rows of new pieces as parameters of their own, so that they train where the rest of a table is frozen.

    E'[i] = R[n(i)] for a new piece i, E[i] else;  h E'^T has h R^T in the places of new pieces

They are a registered submodule of the embeddings, put to use by hooks on every module that has the table: tied output
embeddings too. The table has places for them, which are written when they are folded in.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ..errors import ModelError

CHILD = "new_rows"


class NewRows(nn.Module):
    """The rows; its bound methods are the hooks, so that copies of a model stay whole.

    Args:
        rows: where they start, [n, width].
        ids: of their pieces, [n].
        size: of the vocabulary.
    """

    ids: torch.Tensor
    place: torch.Tensor

    def __init__(self, rows: torch.Tensor, ids: torch.Tensor, size: int) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows)
        place = torch.full((size,), -1)
        place[ids] = torch.arange(len(ids))
        self.register_buffer("ids", ids, persistent=False)
        self.register_buffer("place", place, persistent=False)

    def embed(self, table: nn.Module, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Behind input embeddings, [..., width]. Some scale what they give."""
        place = self.place[given[0]]
        found = functional.embedding(place.clamp(min=0), self.rows) * getattr(table, "embed_scale", 1.0)
        return torch.where((place >= 0).unsqueeze(-1), found.to(output.dtype), output)

    def score(self, head: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Behind output embeddings, [..., size]."""
        bias = getattr(head, "bias", None)
        found = functional.linear(given[0], self.rows, None if bias is None else bias[self.ids])
        return output.index_copy(-1, self.ids, found.to(output.dtype))


def put_on(model: nn.Module, table: nn.Parameter, ids: torch.Tensor) -> str:
    """Gives the rows of new pieces in a table to a module of their own.

    Args:
        model: the model.
        table: [size, width], where these rows have what they start with.
        ids: of new pieces.

    Returns:
        The name of the parameter that holds them.

    Raises:
        ModelError: a module computes something else with the table.
    """
    owners = [(name, module) for name, module in model.named_modules() if module._parameters.get("weight") is table]
    if not owners:
        raise ModelError(
            "vocabulary: a table of the model is not where its new rows could be put", found=str(tuple(table.shape))
        )
    new = NewRows(table.detach()[ids].clone(), ids, len(table))
    new.train(model.training)
    for name, module in owners:
        hook = new.embed if isinstance(module, nn.Embedding) else new.score
        given = ids if isinstance(module, nn.Embedding) else torch.eye(table.shape[1], dtype=table.dtype)[:1]
        with torch.no_grad():
            before = module(given)
            module.register_forward_hook(hook)
            if not torch.allclose(module(given), before, rtol=1e-5, atol=1e-6):
                raise ModelError(
                    f"vocabulary: {name} computes something of its own with its rows: new ones cannot be trained apart",
                    found=type(module).__name__,
                    mend="leave add_tokens, add_languages and train away",
                )
    name, first = owners[0]
    first.add_module(CHILD, new)
    return f"{name}.{CHILD}.rows"


def folded(model: Any) -> Any:
    """A copy of a model with its new rows folded in; the model itself where it has none."""
    if not any(isinstance(module, NewRows) for module in model.modules()):
        return model
    plain = copy.deepcopy(model)
    fold(plain)
    return plain


def fold(model: nn.Module) -> None:
    """Writes new rows into their tables, and takes off what held them; nothing where there are none."""
    for module in list(model.modules()):
        new = module._modules.get(CHILD)
        if not isinstance(new, NewRows):
            continue
        with torch.no_grad():
            module.get_parameter("weight")[new.ids] = new.rows
        del module._modules[CHILD]
        for other in model.modules():
            hooks = other._forward_hooks
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is new]:
                del hooks[key]
