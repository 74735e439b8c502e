"""Full fine-tuning: W' = W - a dL/dW for every tensor of the part."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from torch import nn

from ..anatomy import Part

SUMMARY = "every weight of the part is trained"
FORMULA = "W' = W - a dL/dW"
SOURCE = "Howard & Ruder 2018, Universal Language Model Fine-tuning for Text Classification, arXiv 1801.06146"
WEIGHT_DECAY = 0.01


class Options(BaseModel):
    """Full fine-tuning has no options of its own."""

    model_config = ConfigDict(extra="forbid")


def learning_rate(part: Part, width: int) -> float:
    """Wide and deep pretrained models need smaller steps; a head starts from random weights and takes larger ones.

    Six layers of width 384 were where 3e-4 did well, and twelve where it did not (benchmarks/defaults.py).
    """
    if part.name in ("head", "new"):
        return 1e-3
    return max(3e-4 * min(1.0, (384 / width) ** 2) * min(1.0, 6 / part.depth), 1e-5)


def claims(part: Part, options: Options) -> tuple[str, ...]:
    """Every tensor of the part."""
    return part.parameters


def attach(model: nn.Module, part: Part, options: Options) -> list[str]:
    """Adds nothing; the part's own tensors are trained."""
    return list(part.parameters)
