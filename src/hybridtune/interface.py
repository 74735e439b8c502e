"""Attention implementations of ours, which wrap the one that a model has, by transformers' AttentionInterface.

An implementation's name is a mark of ours and the name of the one inside: with "hybridtune_prefix_sdpa" the model calls
ours, and ours calls "sdpa". Marks stack.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

Attention = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


def name_of(module: nn.Module) -> str:
    """Name of the attention implementation that a module calls."""
    return str(getattr(getattr(module, "config", None), "_attn_implementation", None) or "eager")


def inner(module: nn.Module, mark: str) -> Attention:
    """The implementation inside a marked one; a model's file may have one of its own.

    Args:
        module: the attention module that calls.
        mark: ends where the inner name begins.
    """
    name, file = name_of(module).partition(mark)[2], sys.modules[type(module).__module__]
    found: Attention = file.eager_attention_forward if name == "eager" else file.ALL_ATTENTION_FUNCTIONS[name]
    return found


def inner_mask(name: str, mark: str) -> Callable[..., torch.Tensor | None]:
    """The function inside a marked one that makes the masks, by the name of the marked one."""
    found: Callable[..., torch.Tensor | None] = ALL_MASK_ATTENTION_FUNCTIONS[name.partition(mark)[2]]
    return found


def configs(modules: Iterable[nn.Module]) -> list[Any]:
    """All configuration objects that say which implementation is called: parts of a model may have their own."""
    found = (getattr(module, "config", None) for module in modules)
    return list({id(one): one for one in found if hasattr(one, "_attn_implementation")}.values())


def register(name: str, attention: Attention, mask: Callable[..., torch.Tensor | None]) -> None:
    """Makes an implementation known to transformers, once."""
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, attention)
        AttentionMaskInterface.register(name, mask)
