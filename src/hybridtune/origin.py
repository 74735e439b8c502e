"""What a model that a user has loaded by himself was loaded from, so that a checkpoint can name it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from . import model as models
from . import tasks
from .checkpoint import Base
from .errors import ModelError


def new_of(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that the checkpoint did not have: taken for new are all outside the base model, where
    neither our Auto classes have loaded it nor its files are here to be looked at."""
    known = getattr(model, "_hybridtune_new", None)
    if known is not None:
        return list(known)
    _, info = _as_loaded(model)
    if info is not None:
        return list(models.new_in(info))
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if not name.startswith(prefix)] if any(n.startswith(prefix) for n in names) else []


def base_of(model: PreTrainedModel, new: Sequence[str]) -> Base:
    """Describes the model, so that a checkpoint can name it.

    Raises:
        ModelError: it was rounded when it was loaded, so that no checkpoint can lead back to it.
    """
    twin, _ = _as_loaded(model)
    if twin is not None and twin.dtype == torch.float32 and model.dtype != torch.float32:
        raise ModelError(
            f"model {model.name_or_path}: loaded in {model.dtype}, but its weights are float32",
            mend="load it without dtype=; for training in half precision give TrainingArguments bf16=True",
        )
    task = tasks.for_model(model)
    config = {
        key: getattr(model.config, key)
        for key in ("num_labels", "id2label", "label2id", "problem_type")
        if getattr(model.config, key, None) is not None
    }
    name = getattr(model, "_hybridtune_name", model.name_or_path)
    return Base(name, None, models.fingerprint(model, new), task.auto_class if task else "AutoModel", config)


def _as_loaded(model: PreTrainedModel) -> tuple[PreTrainedModel | None, dict[str, Any] | None]:
    """The model as its checkpoint has it, without memory, and what loading it says; nothing where it is not here."""
    if not model.name_or_path:
        return None, None
    config = copy.deepcopy(model.config)
    config.dtype = None  # that of the files then
    how: dict[str, Any] = {"device_map": "meta", "local_files_only": True, "ignore_mismatched_sizes": True}
    try:
        with models.quiet():
            twin, info = type(model).from_pretrained(
                model.name_or_path, config=config, dtype="auto", output_loading_info=True, **how
            )
    except (OSError, ValueError, TypeError, RuntimeError):
        return None, None
    return twin, info
