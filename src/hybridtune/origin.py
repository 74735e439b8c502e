"""What a model that a user has loaded by himself was loaded from, so that a checkpoint can name it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from . import model as models
from . import tasks
from .checkpoint import Base
from .errors import ModelError
from .files import read_json


def new_of(model: PreTrainedModel) -> list[str]:
    """Names of the parameters that the checkpoint did not have, for a model that a user has loaded by himself.

    Known where our Auto classes have loaded it; else those outside the base model that its files lack.
    """
    known = getattr(model, "_hybridtune_new", None)
    if known is not None:
        return list(known)
    prefix = f"{model.base_model_prefix}."
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if not any(name.startswith(prefix) for name in shapes):
        return []
    had = _in_files(model.name_or_path)
    return [name for name, shape in shapes.items() if not name.startswith(prefix) and had.get(name, ())[1:] != (shape,)]


def _in_files(name: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape of what stands in a checkpoint's safetensors files, where they are on this machine."""

    def find(file: str) -> str | None:
        try:
            found = cached_file(name, file, local_files_only=True, _raise_exceptions_for_missing_entries=False)
        except OSError:
            return None
        return str(found) if found else None

    if not name:
        return {}
    index = find("model.safetensors.index.json")
    files = sorted(set(read_json(Path(index))["weight_map"].values())) if index else ["model.safetensors"]
    had = {}
    for path in filter(None, map(find, files)):
        with safe_open(path, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118
                piece = tensors.get_slice(key)
                had[key] = (str(piece.get_dtype()), tuple(piece.get_shape()))
    return had


def base_of(model: PreTrainedModel, new: Sequence[str]) -> Base:
    """Describes the model that a user has loaded by himself, so that a checkpoint can name it.

    Raises:
        ModelError: it was rounded when it was loaded, so that no checkpoint can lead back to it.
    """
    if model.dtype != torch.float32 and "F32" in {kind for kind, _ in _in_files(model.name_or_path).values()}:
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


class _InFloat32(nn.Module):
    """The parameters of a model that may have been loaded in half precision."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._whole = [model]

    def named_parameters(self, *args: object, **kwargs: object) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in self._whole[0].named_parameters():
            whole = parameter.to(torch.float32) if parameter.is_floating_point() else parameter
            yield name, nn.Parameter(whole, requires_grad=False)
