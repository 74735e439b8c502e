"""One file a task: its file name is its name. Each offers a class `Task` that keeps the contract below."""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import RecipeError, unknown

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.check import Finding
    from ..recipe import Recipe
    from .metrics import Interval

Stats = dict[str, np.ndarray]

_NO_TASKS = {"baselines", "metrics"}  # what the tasks share


class Task(ABC):
    """What a task knows: its columns, its model class, its loss, its predictions and its metrics.

    `columns` holds every column that the task can use with the other names that it commonly has, `required` those that
    rows must have, `inputs` those that the model reads; `hints` are the names that the user's own columns have.

    A task is made from a recipe, learns from the training rows what it has to (the label names, say), and goes into
    the manifest as plain JSON, from which it is made again.
    """

    name: ClassVar[str]
    auto_class: ClassVar[str]
    columns: ClassVar[dict[str, tuple[str, ...]]]
    required: tuple[str, ...]
    inputs: tuple[str, ...]
    metrics: dict[str, str]
    hints: dict[str, str]

    @classmethod
    @abstractmethod
    def from_recipe(cls, recipe: Recipe) -> Task:
        """Makes the task from what the user asked for."""

    @abstractmethod
    def check(self, splits: dict[str, Dataset], sources: dict[str, str]) -> tuple[dict[str, Dataset], list[Finding]]:
        """Checks and repairs the rows, and learns from train what the task needs to know."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All of the task as plain JSON, for the manifest."""

    @classmethod
    @abstractmethod
    def from_state(cls, state: dict[str, Any]) -> Task:
        """Makes the task from a manifest."""

    @abstractmethod
    def model_config(self) -> dict[str, Any]:
        """Values that the model's configuration gets, such as num_labels."""

    @abstractmethod
    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Makes model and tokenizer fit the task (a missing pad token, the padding side)."""

    @abstractmethod
    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> Dataset:
        """Turns rows into what the model takes, unpadded and truncated, with `labels` where rows have them, `length`
        (in tokens, before truncation) and `unknown` (how many of them the tokenizer does not know)."""

    @abstractmethod
    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The sum of the loss over the items, divided by the number of items in the whole global batch (or here)."""

    @abstractmethod
    def decode(self, logits: np.ndarray) -> list[dict[str, Any]]:
        """What `predict` gives for each row."""

    @abstractmethod
    def row_stats(self, logits: np.ndarray, labels: np.ndarray) -> Stats:
        """Per row, all that the metrics are computed from; the first dimension of each array is the rows."""

    @abstractmethod
    def aggregate(self, stats: Stats) -> dict[str, float]:
        """The metrics of these rows."""

    @abstractmethod
    def intervals(self, stats: Stats) -> dict[str, Interval]:
        """The metrics with their 95% intervals."""

    @abstractmethod
    def baselines(
        self, train: Dataset, test: Dataset, features: tuple[np.ndarray, np.ndarray] | None
    ) -> list[tuple[str, str, Stats]]:
        """Name, how it was made, and row statistics on test, of each baseline. `features`: frozen ones of both."""

    @abstractmethod
    def profile(self, splits: dict[str, Dataset]) -> dict[str, Any]:
        """What data.json says of the labels."""

    @abstractmethod
    def errors(self, stats: Stats, rows: Dataset, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What evaluation.json says of where the model is wrong."""

    @property
    def metric(self) -> str:
        """The task's own metric, where the goal names none."""
        return next(iter(self.metrics))

    def rows_from(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """Rows from what `predict` was given: dicts of the task's columns, or bare values where one column is all."""
        return [item if isinstance(item, dict) else {self.inputs[0]: item} for item in inputs]


def names() -> list[str]:
    """Names of the tasks that the package brings."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NO_TASKS)


def load(name: str) -> type[Task]:
    """Finds a task by its name.

    Raises:
        RecipeError: there is no such task.
    """
    if name not in names():
        raise RecipeError(f"task: {unknown('task', name, names())}", expected=", ".join(names()))
    task: type[Task] = importlib.import_module(f".{name}", __name__).Task
    return task


def for_model(model_class: str) -> type[Task] | None:
    """The task that a transformers model class is made for, by its name, or None."""
    for name in names():
        task = load(name)
        if model_class.endswith(task.auto_class.removeprefix("AutoModel")):
            return task
    return None
