"""Bias tuning (BitFit): b' = b - a dL/db for every bias vector of the part.

Where the part has no bias vector at all (Llama, Gemma, T5, ModernBERT), each of its matrices gets one that starts at
zero, so that its output is x W + b.
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from ..anatomy import Part
from ..errors import MethodError
from ._modules import unhook, width_of

SUMMARY = "the bias vectors of the part are trained; a part without any gets new ones"
FORMULA = "b' = b - a dL/db"
SOURCE = (
    "Ben Zaken et al. 2021, BitFit, arXiv 2106.10199; new biases: Gao et al. 2023, LLaMA-Adapter V2, arXiv 2304.15010"
)
MERGES = "the model's own files have no place for the biases that it did not have"


class Options(BaseModel):
    """Bias tuning has no options."""

    model_config = ConfigDict(extra="forbid")


class Bias(nn.Module):
    """A bias for a matrix that has none; its hook is its own bound method, so that copies of a model stay whole."""

    def __init__(self, weight: torch.Tensor, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width, device=weight.device, dtype=weight.dtype))

    def after(self, module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        """Forward hook of the matrix; output is [..., width]."""
        return output + self.bias


def learning_rate(part: Part, width: int) -> float:
    """BitFit's paper takes 1e-4 to 1e-2; small models the larger ones."""
    return max(2e-3 * min(1.0, 384 / width), 4e-4)


def claims(part: Part, options: Options) -> tuple[str, ...]:
    """The part's bias vectors."""
    return part.biases


def attach(model: nn.Module, part: Part, options: Options) -> list[str]:
    """Adds biases where the part has none; else its own are trained.

    Raises:
        MethodError: nothing of the part is left, neither biases nor matrices without one, or it has new ones already.
    """
    if part.biases:
        return list(part.biases)
    bare = [path for path in part.matrices if getattr(model.get_submodule(path), "bias", None) is None]
    if not bare:  # biases that a later rule has claimed are there too
        raise MethodError(f"bias on {part}: neither a bias nor a matrix is left there", expected="layers, as a rule")
    names = []
    for path in bare:
        parent, _, child = path.rpartition(".")
        layer, name = model.get_submodule(parent), f"{child}_bias"
        if hasattr(layer, name):
            raise MethodError(f"bias on {path}: it has a new one already", mend="one bias rule for each matrix")
        matrix = model.get_submodule(path)
        weight = next(matrix.parameters())
        added = Bias(weight, width_of(matrix, "out"))
        layer.add_module(name, added)
        matrix.register_forward_hook(added.after)
        names.append(f"{path}_bias.bias")
    return names


def detach(model: nn.Module, names: list[str]) -> None:
    """Takes the new biases off again, hooks included."""
    for name in names:
        owner, _, child = name.removesuffix(".bias").rpartition(".")
        layer = model.get_submodule(owner)
        added = getattr(layer, child)
        unhook([model.get_submodule(name.removesuffix("_bias.bias"))], added)
        delattr(layer, child)
