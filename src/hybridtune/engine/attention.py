"""Attention over a packed row: every row sees itself and no other.

On a GPU one call may do it all (see `varlen`). Else what the model would have called (sdpa, eager, the prefixes around
them), or what is faster than torch's (see `products`), is called for each group of rows of about one length; those of
one length need no padding mask. Causality, windows and biases stay its own business: the group's mask is made by the
same function, and only where the model asked for one or the group has padding.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

from .. import interface
from . import products, varlen
from .layout import Layout

MARK = "hybridtune_packed_"


@dataclass
class Mask:
    """What a model asked its mask function for, kept until attention knows its groups.

    Attributes:
        keys: layout of the keys that it is about.
        asked: arguments of the mask function.
        queries: layout of the queries: the keys' own, but in cross-attention.
    """

    keys: Layout
    asked: dict[str, Any]
    queries: Layout
    _made: dict[int, torch.Tensor | None] = field(default_factory=dict)
    _crossed: dict[int, tuple[Layout, Mask]] = field(default_factory=dict)

    def with_queries(self, queries: Layout) -> Mask:
        """The mask of cross-attention, where rows go in pairs; layers with the same queries are given the same."""
        if id(queries) not in self._crossed:
            own, keys = queries.together(self.keys, merge=is_plain(self.asked["mask_function"]))
            self._crossed[id(queries)] = queries, Mask(keys, self.asked, own)
        return self._crossed[id(queries)][1]

    @cached_property
    def apart(self) -> Mask:
        """The mask of self-attention in which what a row is padded to does not depend on the others."""
        layout = self.keys.apart(merge=is_plain(self.asked["mask_function"]))
        return Mask(layout, self.asked, layout)

    def of(self, group: int) -> torch.Tensor | None:
        """The mask of a group's queries over its keys, as the model's own implementation wants it."""
        if group not in self._made:
            queries, keys = self.queries.groups[group], self.keys.groups[group]
            sizes = {"batch_size": len(keys.rows), "q_length": queries.length, "kv_length": keys.length}
            padding = None if keys.even else keys.mask.to(self.keys.index.device)
            more = {"attention_mask": padding, "mask_function": self._function(group)}
            self._made[group] = self.build(self.asked | sizes | more)
        return self._made[group]

    def whole(self) -> torch.Tensor | None:
        """The mask that the model asked for, of the padded batch."""
        return self.build(self.asked)

    @staticmethod
    def build(asked: dict[str, Any]) -> torch.Tensor | None:
        """Calls the function that the model's own implementation makes masks with."""
        return interface.inner_mask(asked["config"]._attn_implementation, MARK)(**asked)

    def _function(self, group: int) -> Any:
        """Says which key a query sees; what is no plain relation of two places is asked for those in the batch."""
        function = self.asked["mask_function"]
        if is_plain(function):
            return function
        rows = torch.tensor(self.keys.groups[group].rows, device=self.keys.index.device)
        before, after = self.queries.columns[group], self.keys.columns[group]
        return lambda batch, head, q, k: function(rows[batch], head, before[batch, q], after[batch, k])


def is_plain(function: Any) -> bool:
    """Whether what a query sees follows from the order of two places alone: all, or all before it."""
    return function in (causal_mask_function, bidirectional_mask_function)


def of(mask: Any) -> Mask | None:
    """What an attention mask stands for, where it is one of ours."""
    found: Mask | None = getattr(mask, "_hybridtune", None)
    return found


def carry(mask: Mask, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that a model hands down to its attention as it would its own mask."""
    tensor._hybridtune = mask  # type: ignore[attr-defined]
    return tensor


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An attention implementation: what the model had, group by group.

    Args:
        module: the attention module that calls.
        query: [1, heads, tokens, head width], packed; of a batch that is not packed as usual.
        key, value: [1, key heads, tokens, head width].
        attention_mask: carries a `Mask`; another one is handed on.
    """
    inner, mask = interface.inner(module, MARK), of(attention_mask)
    if mask is not None and query.shape[::2] != (1, len(mask.queries.index)):  # of another model with the same config
        attention_mask, mask = mask.whole(), None
    if mask is None:
        return inner(module, query, key, value, attention_mask, **kwargs)
    bias = kwargs.pop("position_bias", None)
    crosses = mask.queries is not mask.keys
    if crosses and not getattr(module, "has_relative_attention_bias", False):
        bias = None  # T5's zeros: between two texts there is no distance
    function, p = mask.asked["mask_function"], kwargs.get("dropout") or 0.0
    whole = inner is sdpa_attention_forward and bias is None and not crosses and is_plain(function)
    if whole and varlen.fits(query, value):
        causal, states = function is causal_mask_function, (query, key, value)
        return varlen.attention(states, mask.keys, causal, kwargs.get("scaling"), p), None
    known: dict[str, Any] = {key: kwargs[key] for key in ("dropout", "scaling", "is_causal") if key in kwargs}
    groups = zip(mask.queries.split(query, 2), mask.keys.split(key, 2), mask.keys.split(value, 2), strict=True)
    results = []
    for number, (q, k, v) in enumerate(groups):
        if bias is not None:
            known["position_bias"] = kwargs["position_bias"] = bias[:, :, : q.shape[2], : k.shape[2]]
        if inner is sdpa_attention_forward and products.pays(q, k, p):
            found, _ = products.attention(module, q, k, v, mask.of(number), **known)
        else:
            found, _ = inner(module, q, k, v, mask.of(number), **kwargs)
        results.append(found)
    return mask.queries.join(results), None
