"""Names for code that was written for transformers: change the import line, nothing else.

from hybridtune import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedModel, TrainingArguments

from . import checkpoint
from . import model as models
from .anatomy import Anatomy
from .checkpoint import MANIFEST, Base
from .compose import Assembly, resolve
from .recipe import Rule, Stage, Strategy, Training
from .train import HybridTrainer, base_of

Trainer = HybridTrainer

__all__ = ["AutoModelForSequenceClassification", "AutoTokenizer", "Trainer", "TrainingArguments"]


@dataclass
class InPlace:
    """What `model.add_adapter` has put on a model, for HybridTrainer to find."""

    assembly: Assembly
    base: Base
    strategy: Strategy


class AutoModelForSequenceClassification:
    """`transformers.AutoModelForSequenceClassification`, whose models take a bottleneck adapter by name."""

    @classmethod
    def from_pretrained(cls, name: str | Path, *args: Any, **kwargs: Any) -> PreTrainedModel:
        """Loads a model as transformers does, or a folder that `Trainer.save_model` has written.

        Args:
            name: hub id, folder, the name of a packaged model, or a folder with a delta.
            *args: as transformers takes them.
            **kwargs: as transformers takes them.

        Raises:
            RunError, ModelError: a delta is damaged, or its base has other weights.
        """
        if (Path(name) / MANIFEST).is_file():
            return checkpoint.load(Path(name))[0].model
        kwargs.pop("output_loading_info", None)
        auto = transformers.AutoModelForSequenceClassification
        model, info = auto.from_pretrained(models.locate(str(name)), *args, output_loading_info=True, **kwargs)
        model.add_adapter = MethodType(_add_adapter, model)
        model._hybridtune_new = tuple(sorted(info["missing_keys"]))
        model._hybridtune_name = str(name)
        return model


def _add_adapter(
    model: PreTrainedModel, adapter: Any = "default", adapter_name: str | None = None, **options: Any
) -> None:
    """Adds a bottleneck adapter to every layer, by name; a PEFT config goes to transformers, as ever.

    The adapter and the head are what `Trainer` trains then.

    Args:
        model: the model.
        adapter: the adapter's name, or a PEFT config.
        adapter_name: the adapter's name where a PEFT config is given.
        **options: of the method `adapter`, such as bottleneck=64.

    Raises:
        MethodError: the model has an adapter already.
        RecipeError: an option is unknown.
    """
    if not isinstance(adapter, str):
        type(model).add_adapter(model, adapter, adapter_name)
        return
    new = getattr(model, "_hybridtune_new", ())
    assembly = Assembly(model, Anatomy(model, new))
    base = base_of(model, new, getattr(model, "_hybridtune_name", None))
    stage = Stage(
        name=adapter, rules=[Rule(part="layers", method="adapter", **options), Rule(part="head", method="full")]
    )
    asked = Strategy(name=adapter, stages=[stage])
    filled, _ = resolve(asked, Training(), assembly.anatomy, models.width(model), stage_defaults={})
    assembly.begin(filled.stages[0])
    model._hybridtune = InPlace(assembly, base, asked)  # type: ignore[assignment]
