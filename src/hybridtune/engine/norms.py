"""Norms by the root of the mean square (RMSNorm: Zhang and Sennrich 2019, arXiv 1910.07467) in one kernel of torch's.

    y = w x / sqrt(mean(x^2) + eps)

transformers spells the formula out, in half a dozen passes over x and twice as many backwards: an eighth of a step of a
decoder of 0.5B parameters on a GPU. On a CPU torch spells it out as well. Modules with another formula (Gemma's takes
1 + w) are found by trying, and left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from . import proof
from .patch import patch

EPS = ("variance_epsilon", "eps", "epsilon")
SIZES = (1e-3, 1.0, 1e2)  # of the rows that a module shows its formula on: of the smallest eps is a good part
ALLOWED = 1e-5  # by which each may differ, in fp32


def pays(device: torch.device) -> bool:
    """Whether torch has a kernel for it."""
    return device.type != "cpu"


def find(model: nn.Module) -> tuple[nn.Module, ...]:
    """The modules of a model that compute the formula, as transformers spells it out."""
    return tuple(module for module in model.modules() if _spells_it_out(module))


def speed_up(modules: Iterable[nn.Module], undo: ExitStack) -> None:
    """Has them compute it in one kernel, until `undo` is closed.

    Args:
        modules: found by `find`.
        undo: takes it back.
    """
    for module in modules:
        if "forward" not in vars(module):
            patch(module, "forward", partial(_forward, module, module.forward), undo)


def _forward(module: Any, own: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args or kwargs or x.dtype != module.weight.dtype:
        result: torch.Tensor = own(x, *args, **kwargs)
        return result
    return functional.rms_norm(x, module.weight.shape, module.weight, _eps(module))


def _eps(module: nn.Module) -> Any:
    return next((getattr(module, name) for name in EPS if hasattr(module, name)), None)


def _spells_it_out(module: nn.Module) -> bool:
    weights = dict(module.named_parameters())
    if list(weights) != ["weight"] or weights["weight"].dim() != 1 or not isinstance(_eps(module), float):
        return False
    of_transformers = type(module).__module__.startswith("transformers.")  # torch's, Liger's are fast as they are
    if not of_transformers or "forward" in vars(module):
        return False
    there: Any = copy.copy(module)
    exact = weights["weight"].detach().cpu().float()  # in half precision other formulas come near
    there._parameters = {"weight": nn.Parameter(exact, requires_grad=False)}
    x = torch.randn(len(SIZES), len(exact), generator=torch.Generator().manual_seed(0)) + 1.0
    x = x * torch.tensor(SIZES)[:, None]
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            expected = type(module).forward(there, x)  # past hooks, to which these rows are none
        except proof.WRONG:  # it takes more than x
            return False
        if not torch.is_tensor(expected) or expected.shape != x.shape:
            return False
        pairs = zip(_forward(there, None, x), expected, strict=True)
        return all(proof.difference(found, one) <= ALLOWED for found, one in pairs)
