"""Freezing: nothing of the part is trained, whatever an earlier rule said."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from torch import nn

from ..anatomy import Part

SUMMARY = "nothing of the part is trained"
FORMULA = "W' = W"
SOURCE = "Yosinski et al. 2014, How transferable are features in deep neural networks?, arXiv 1411.1792"
FREEZES = True


class Options(BaseModel):
    """Freezing has no options."""

    model_config = ConfigDict(extra="forbid")


def learning_rate(part: Part, width: int) -> float:
    """None is used: nothing is trained."""
    return 0.0


def claims(part: Part, options: Options) -> tuple[str, ...]:
    """Every tensor of the part."""
    return part.parameters


def attach(model: nn.Module, part: Part, options: Options) -> list[str]:
    """Adds nothing and trains nothing."""
    return []
