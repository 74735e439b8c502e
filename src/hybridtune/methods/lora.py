"""LoRA: W0 + (alpha / r) B A with W0 frozen, by PEFT."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from ..anatomy import Part
from ..errors import MethodError

SUMMARY = "a low-rank update beside each frozen matrix"
FORMULA = "W' = W0 + (alpha / r) B A"
SOURCE = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685"
MERGES = True
WRAPS = True
WEIGHT_DECAY = 0.0
ADAPTER_NAME = "default"


class Options(BaseModel):
    """Options of PEFT's LoraConfig.

    Attributes:
        r: the rank.
        lora_alpha: numerator of the scaling; 2 r where not given.
        lora_dropout: dropout on what goes into A.
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
        use_dora: train magnitude and direction apart (Liu et al. 2024, arXiv 2402.09353).
        init_lora_weights: PEFT's name of an initialisation.
    """

    model_config = ConfigDict(extra="forbid")

    r: int = Field(16, gt=0)
    lora_alpha: float | None = Field(None, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True

    @model_validator(mode="after")
    def _default_alpha(self) -> Options:
        self.lora_alpha = self.lora_alpha or 2.0 * self.r
        return self


def learning_rate(part: Part, width: int) -> float:
    """About ten times that of full fine-tuning on wide models (Schulman et al. 2025, LoRA Without Regret)."""
    return max(1e-3 * min(1.0, 384 / width), 1e-4)


def claims(part: Part, options: Options) -> tuple[str, ...]:
    """The matrices it sits on: they stay frozen."""
    return tuple(f"{name}.weight" for name in part.matrices if f"{name}.weight" in part.parameters)


def attach(model: nn.Module, part: Part, options: Options) -> list[str]:
    """Puts LoRA on every matrix of the part.

    Raises:
        MethodError: the part has no matrix that LoRA can sit on.
    """
    from peft import inject_adapter_in_model

    if not part.matrices:
        raise MethodError(
            f"lora on {part}: no matrix is left there for it",
            expected="a part with linear layers, such as layers or layers.attention",
        )
    noted = hasattr(model, "peft_config")
    inject_adapter_in_model(config(options, list(part.matrices)), model, ADAPTER_NAME)
    if not noted:
        del model.peft_config  # the next rule would get a warning for it
    inside = tuple(f"{name}.lora_" for name in part.matrices)
    return [name for name, _ in model.named_parameters() if name.startswith(inside)]


def config(options: Options, targets: list[str], **more: Any) -> Any:
    """PEFT's LoraConfig for exactly these matrices: a pattern, since a list would match name endings too."""
    from peft import LoraConfig

    pattern = "|".join(re.escape(name) for name in targets)
    return LoraConfig(target_modules=pattern, **options.model_dump(), **more)


def _layers(names: list[str]) -> list[str]:
    return list(dict.fromkeys(re.split(r"\.lora_", name)[0] for name in names))


def merge(model: nn.Module, names: list[str]) -> None:
    """Folds the updates into the matrices and takes PEFT's layers off."""
    for path in _layers(names):
        model.get_submodule(path).merge(safe_merge=True, adapter_names=[ADAPTER_NAME])  # type: ignore[operator]
    detach(model, names)


def detach(model: nn.Module, names: list[str]) -> None:
    """Puts the plain matrices back in the place of PEFT's layers."""
    for path in _layers(names):
        parent, _, child = path.rpartition(".")
        setattr(model.get_submodule(parent), child, model.get_submodule(path).base_layer)
