"""Norm tuning: the weights and biases of the part's normalisation layers, and nothing else."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from torch import nn

from ..anatomy import Part
from ..errors import MethodError

SUMMARY = "the normalisation layers of the part are trained"
FORMULA = "g' = g - a dL/dg, b' = b - a dL/db"
SOURCE = (
    "Zhao et al. 2023, Tuning LayerNorm in Attention, arXiv 2312.11420; "
    "Qi et al. 2022, Parameter-Efficient Tuning on Layer Normalization, arXiv 2211.08682"
)


class Options(BaseModel):
    """Norm tuning has no options."""

    model_config = ConfigDict(extra="forbid")


def learning_rate(part: Part, width: int) -> float:
    """Few numbers, each of which acts on a whole layer: steps as large as an adapter's."""
    return max(1e-3 * min(1.0, 384 / width), 1e-4)


def claims(part: Part, options: Options) -> tuple[str, ...]:
    """The part's norms."""
    return part.norms


def attach(model: nn.Module, part: Part, options: Options) -> list[str]:
    """Adds nothing; the norms are trained.

    Raises:
        MethodError: the part has none.
    """
    if not part.norms:
        raise MethodError(
            f"norm on {part}: no normalisation layer is left there", expected="layers, norms or all, as a rule"
        )
    return list(part.norms)
