"""Names for code that was written for transformers: change the import line, nothing else.

from hybridtune import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments
"""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, TrainingArguments

from . import checkpoint
from . import model as models
from .anatomy import Anatomy
from .checkpoint import MANIFEST, Base
from .compose import Assembly
from .errors import MethodError
from .origin import base_of
from .recipe import Rule, Stage, Strategy, Training
from .resolve import resolve
from .train import HybridTrainer
from .tuned import Tuned, save_pretrained

Trainer = HybridTrainer

__all__ = ["AutoModelForSequenceClassification", "AutoTokenizer", "Trainer", "TrainingArguments"]


class AutoTokenizer(transformers.AutoTokenizer):  # type: ignore[misc]
    """`transformers.AutoTokenizer`, which knows the names of packaged models too."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Loads a tokenizer as transformers does.

        Args:
            pretrained_model_name_or_path: hub id, folder, or the name of a packaged model.
            *args: as transformers takes them.
            **kwargs: as transformers takes them.
        """
        return super().from_pretrained(models.locate(str(pretrained_model_name_or_path)), *args, **kwargs)


class AutoModelForSequenceClassification(transformers.AutoModelForSequenceClassification):  # type: ignore[misc]
    """`transformers.AutoModelForSequenceClassification`, whose models take a bottleneck adapter by name."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> Any:
        """Loads a model as transformers does, or a folder that `Trainer.save_model` has written.

        Args:
            pretrained_model_name_or_path: hub id, folder, the name of a packaged model, or a folder with a delta.
            *args: as transformers takes them.
            **kwargs: as transformers takes them; of a delta `dtype` and `output_loading_info` count, the others are
                written in it.

        Raises:
            RunError, ModelError: a delta is damaged, or its base has other weights.
        """
        name, asked = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        if (Path(name) / MANIFEST).is_file():
            model = _tuned(Path(name), kwargs.get("dtype", kwargs.get("torch_dtype", "auto")))
            none = {key: set[str]() for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
            return (model, {**none, "error_msgs": []}) if asked else model  # damage is an error
        model, info = super().from_pretrained(models.locate(str(name)), *args, output_loading_info=True, **kwargs)
        _bind(model)
        model._hybridtune_new = models.new_in(info)
        model._hybridtune_name = str(name)
        return (model, info) if asked else model


def _tuned(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    """Loads a delta; `Trainer` goes on with the last stage of what made it."""
    loaded, assembly, manifest = checkpoint.load(folder)
    model, strategy = loaded.model, manifest.get("strategy")
    if dtype == "auto":
        known = (folder / "config.json").is_file()
        dtype = transformers.AutoConfig.from_pretrained(folder).dtype if known else torch.float32
    model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    _bind(model)
    if strategy is not None:
        made = Strategy(**strategy)
        base = Base(**manifest["base"])
        model._hybridtune = Tuned.by(made.name, made.stages[-1], assembly, base, loaded.tokenizer)  # type: ignore[assignment]
    return model


def _bind(model: Any) -> None:
    model.add_adapter = MethodType(add_adapter, model)
    model.save_pretrained = MethodType(save_pretrained, model)


def add_adapter(
    model: PreTrainedModel, adapter_config: Any = "default", adapter_name: str | None = None, **options: Any
) -> None:
    """Adds a bottleneck adapter to every layer, by name; a PEFT config goes to transformers, as ever.

    The adapter and the head are what `Trainer` trains then.

    Args:
        model: the model.
        adapter_config: the adapter's name, or a PEFT config.
        adapter_name: the adapter's name where a PEFT config is given.
        **options: of the method `adapter`, such as bottleneck=64.

    Raises:
        MethodError: the model has an adapter already.
        RecipeError: an option is unknown.
    """
    there: Tuned | None = getattr(model, "_hybridtune", None)
    if there is not None:
        raise MethodError(
            f"add_adapter: the model is tuned by {there.strategy.name} already",
            mend="load the model again for another adapter, or give Trainer a strategy of several rules",
        )
    if not isinstance(adapter_config, str):
        before = model._hf_peft_config_loaded
        try:
            type(model).add_adapter(model, adapter_config, adapter_name, **options)
        except TypeError:
            model._hf_peft_config_loaded = before  # transformers sets it before it looks at the config
            raise
        return
    if model._hf_peft_config_loaded:
        raise MethodError(
            "add_adapter: PEFT sits on the model already",
            mend="load the model again, or give both as rules of a strategy",
        )
    new = getattr(model, "_hybridtune_new", ())
    assembly, base = Assembly(model, Anatomy(model, new)), base_of(model, new)
    rules = [Rule(part="layers", method="adapter", **options), Rule(part="head", method="full")]
    asked = Strategy(name=adapter_config, stages=[Stage(name=adapter_config, rules=rules)])
    filled, _ = resolve(asked, Training(), assembly, models.width(model), {})
    assembly.begin(filled.stages[0])
    model._hybridtune = Tuned(assembly, base, asked)  # type: ignore[assignment]
