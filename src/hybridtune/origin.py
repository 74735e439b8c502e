"""What a model that a user has loaded by himself was loaded from, so that a checkpoint can name it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
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
        return new_in(info)
    prefix = f"{model.base_model_prefix}."
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if not name.startswith(prefix)] if any(n.startswith(prefix) for n in names) else []


def new_in(info: dict[str, Any]) -> list[str]:
    """Names that transformers' loading info reports as missing, or as there in another shape."""
    mismatched = (item[0] if isinstance(item, (tuple, list)) else item for item in info.get("mismatched_keys", ()))
    return sorted({*info["missing_keys"], *mismatched})


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
    task = tasks.for_model(type(model).__name__)
    config = {
        key: getattr(model.config, key)
        for key in ("num_labels", "id2label", "label2id", "problem_type")
        if getattr(model.config, key, None) is not None
    }
    name = getattr(model, "_hybridtune_name", model.name_or_path)
    fingerprint = models.fingerprint(_InFloat32(model), new)  # as `models.load` will load it
    return Base(name, None, fingerprint, task.auto_class if task else "AutoModel", config)


def _as_loaded(model: PreTrainedModel) -> tuple[PreTrainedModel | None, dict[str, Any] | None]:
    """The model as its checkpoint has it, without memory, and what loading it says; nothing where it is not here."""
    if not model.name_or_path:
        return None, None
    config = copy.deepcopy(model.config)
    config.dtype = None  # that of the files then
    how: dict[str, Any] = {"device_map": "meta", "local_files_only": True, "ignore_mismatched_sizes": True}
    try:
        with models._quiet():
            twin, info = type(model).from_pretrained(
                model.name_or_path, config=config, dtype="auto", output_loading_info=True, **how
            )
    except (OSError, ValueError, TypeError, RuntimeError):
        return None, None
    return twin, info


class _InFloat32(nn.Module):
    """The parameters of a model that may have been loaded in half precision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._whole = [model]

    def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._whole[0].named_parameters():
            whole = parameter.to(torch.float32) if parameter.is_floating_point() else parameter
            yield name, nn.Parameter(whole, requires_grad=False)
