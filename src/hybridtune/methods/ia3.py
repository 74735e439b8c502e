"""(IA)3: learned factors on keys, values and what goes into the feed-forward block's last matrix, by PEFT."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from pydantic import BaseModel, ConfigDict
from torch import nn

from ..anatomy import Part
from ..errors import MethodError
from ._peft import inject, take_off

SUMMARY = "learned factors on keys, values and the feed-forward block's middle"
FORMULA = "k' = l_k k, v' = l_v v, h' = W (l_f h)"
SOURCE = "Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper, arXiv 2205.05638"
WRAPS = True
# Where a part has several projections, those that the paper scales.
_SCALED = ("k", "v", "qkv", "down")


class Options(BaseModel):
    """(IA)3 has no options: the factors start at one."""

    model_config = ConfigDict(extra="forbid")


def learning_rate(part: Part, width: int) -> float:
    """The paper takes 3e-3 for a model of width 2048; a factor is as good for a narrow model as for a wide one."""
    return 3e-3


def targets(part: Part) -> tuple[str, ...]:
    """Its matrices in the part: keys, values and `down`; all of them where a projection is named."""
    roles = set(part.roles.values())
    return tuple(name for name in part.matrices if len(roles) == 1 or part.roles.get(name) in _SCALED)


def claims(part: Part, options: Options) -> tuple[str, ...]:
    """The matrices it sits on, with their biases: they stay frozen."""
    own = {f"{name}.{tensor}" for name in targets(part) for tensor in ("weight", "bias")}
    return tuple(name for name in part.parameters if name in own)


def attach(model: nn.Module, part: Part, options: Options) -> list[str]:
    """Puts the factors on the part.

    Raises:
        MethodError: the part has no keys, values or feed-forward block.
    """
    if not targets(part):
        raise MethodError(
            f"ia3 on {part}: no keys, values or feed-forward matrices are left there",
            expected="layers, layers.attention, layers.mlp, or a projection such as layers.attention.v",
        )
    own = replace(part, matrices=targets(part))
    return inject(model, config(options, own), list(own.matrices), "ia3_")


def config(options: Options, part: Part, **keys: Any) -> Any:
    """PEFT's IA3Config for exactly these matrices."""
    from peft import IA3Config

    forward = [name for name in part.matrices if part.roles.get(name) == "down"]
    given = {
        "target_modules": "|".join(map(re.escape, part.matrices)),
        "feedforward_modules": "|".join(map(re.escape, forward)) or "(?!)",
    }
    return IA3Config(**{**given, **keys})


def merge(model: nn.Module, names: list[str]) -> None:
    """Multiplies the factors into the matrices and takes PEFT's layers off."""
    take_off(model, names, ".ia3_", merge=True)


def detach(model: nn.Module, names: list[str]) -> None:
    """Puts the plain matrices back in the place of PEFT's layers."""
    take_off(model, names, ".ia3_")
