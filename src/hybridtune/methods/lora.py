"""LoRA: W0 + (alpha / r) B A with W0 frozen, by PEFT."""

from __future__ import annotations

import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..anatomy import Part
from ..errors import MethodError
from ._peft import inject, take_off

SUMMARY = "a low-rank update beside each frozen matrix"
FORMULA = "W' = W0 + (alpha / r) B A"
SOURCE = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, arXiv 2106.09685"
WRAPS = True
# PEFT's initialisations that need the weights alone; and those of all that move a part of W0 into B A, or round W0.
_INITS = re.compile(r"gaussian|orthogonal|mica|olora|pissa|pissa_niter_\d+")
_MOVES = ("olora", "pissa", "corda", "lora_ga", "loftq")
_ELSEWHERE = {
    "eva": "a pass over the data",
    "corda": "a pass over the data",
    "lora_ga": "gradients of the data",
    "loftq": "a quantised base model",
}


class Options(BaseModel):
    """Options of PEFT's LoraConfig, and one of LoRA+.

    Attributes:
        r: the rank.
        lora_alpha: numerator of the scaling; 2 r where not given.
        lora_dropout: dropout on what goes into A.
        use_rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023, arXiv 2312.03732).
        use_dora: train magnitude and direction apart (Liu et al. 2024, arXiv 2402.09353).
        init_lora_weights: true (B = 0), "gaussian", "orthogonal", "pissa" or "pissa_niter_N" (Meng et al. 2024, arXiv
            2404.02948), "olora" (Buyukakyuz 2024, arXiv 2406.01775), or "mica" (B stays frozen).
        loraplus_lr_ratio: learning rate of B over that of A (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    """

    model_config = ConfigDict(extra="forbid")

    r: int = Field(16, gt=0)
    lora_alpha: float | None = Field(None, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    loraplus_lr_ratio: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _fits(self) -> Options:
        self.lora_alpha = self.lora_alpha or 2.0 * self.r
        init = self.init_lora_weights
        if init in _ELSEWHERE:
            raise ValueError(f"init_lora_weights: {init} needs {_ELSEWHERE[str(init)]}, which hybridtune does not give")
        if isinstance(init, str) and not _INITS.fullmatch(init):
            raise ValueError(f"init_lora_weights: {init} is not true, gaussian, orthogonal, pissa, olora or mica")
        if init == "orthogonal" and self.r % 2:
            raise ValueError("init_lora_weights: orthogonal needs an even r")
        if init == "mica" and self.use_dora:
            raise ValueError("init_lora_weights: mica and use_dora exclude each other")
        return self


def learning_rate(part: Part, width: int) -> float:
    """About ten times that of full fine-tuning on wide models (Schulman et al. 2025, LoRA Without Regret)."""
    return max(1e-3 * min(1.0, 384 / width), 1e-4)


def rate(name: str, options: Options) -> float:
    """B learns faster under LoRA+."""
    return options.loraplus_lr_ratio if ".lora_B." in name else 1.0


def claims(part: Part, options: Options) -> tuple[str, ...]:
    """The matrices it sits on: they stay frozen."""
    return tuple(f"{name}.weight" for name in part.matrices if f"{name}.weight" in part.parameters)


def changes(part: Part, options: Options) -> tuple[str, ...]:
    """The same, where the initialisation moves a part of them into B A."""
    return claims(part, options) if moves(options.init_lora_weights) else ()


def moves(init: bool | str | None) -> bool:
    """Whether one of PEFT's initialisations changes the matrices that it is given, so that B A is theirs alone."""
    return str(init).lower().startswith(_MOVES)


def attach(model: nn.Module, part: Part, options: Options) -> list[str]:
    """Puts LoRA on every matrix of the part.

    Raises:
        MethodError: the part has no matrix that LoRA can sit on, or one that the initialisation cannot.
    """
    if not part.matrices:
        raise MethodError(
            f"lora on {part}: no matrix is left there for it",
            expected="a part with linear layers, such as layers or layers.attention",
        )
    modules = [model.get_submodule(name) for name in part.matrices]
    if options.init_lora_weights == "olora" and any(isinstance(module, Conv1D) for module in modules):
        raise MethodError(
            f"lora on {part}: PEFT's olora cannot start on transposed matrices", mend="init_lora_weights: pissa"
        )
    thin = min(min(module.weight.shape) for module in modules)  # type: ignore[arg-type]
    if (changes(part, options) or options.init_lora_weights == "mica") and options.r > thin:
        raise MethodError(
            f"lora on {part}: {options.init_lora_weights} needs r no larger than the matrices",
            found=f"r {options.r}",
            expected=f"at most {thin}",
        )
    start: dict[str, Any] = (
        {"init_lora_weights": True} if modules[0].weight.is_meta else {}
    )  # PEFT's mica needs numbers
    names = inject(model, config(options, part, **start), list(part.matrices), "lora_")
    return [name for name in names if not (options.init_lora_weights == "mica" and ".lora_B." in name)]


def config(options: Options, part: Part, **keys: Any) -> Any:
    """PEFT's LoraConfig for exactly these matrices: a pattern, since a list would match name endings too."""
    from peft import LoraConfig

    given = options.model_dump(exclude={"loraplus_lr_ratio"})
    return LoraConfig(**{"target_modules": "|".join(map(re.escape, part.matrices)), **given, **keys})


def merge(model: nn.Module, names: list[str]) -> None:
    """Folds the updates into the matrices and takes PEFT's layers off."""
    take_off(model, names, ".lora_", merge=True)


def detach(model: nn.Module, names: list[str]) -> None:
    """Puts the plain matrices back in the place of PEFT's layers."""
    take_off(model, names, ".lora_")
