"""One file a task: its file name is its name. Each offers a class `Task` that keeps the contract below.

A task of the user's own is such a file anywhere: `task: ./mine.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np

from .. import own_file
from ..errors import RecipeError, unknown
from . import metrics as measures

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase

    from ..data.checking.check import Finding
    from ..recipe import Recipe
    from .metrics import Interval

Stats = dict[str, np.ndarray]


class Baseline(NamedTuple):
    """A predictor that no tuning is needed for, and what it says of test rows.

    Attributes:
        name: what it is called.
        detail: how it was made.
        stats: row statistics, as of `Task.row_stats`.
        answers: for each row what a prediction's `Task.answer` would be, for metrics of the user's own.
    """

    name: str
    detail: str
    stats: Stats
    answers: Sequence[Any] | None = None


Kind = Literal["classes", "labels", "values"]
Logits = Sequence[np.ndarray]  # an array an item

_NO_TASKS = {"baselines", "metrics"}  # what the tasks share, and what begins with an underscore


class Task(ABC):
    """What a task knows: its columns, its model class, its loss, its predictions and its metrics.

    A task is made from a recipe, learns from the training rows what it has to (the label names, say), and goes into
    the manifest as plain JSON, from which it is made again.

    *Rows* are the user's. *Items* are what the model takes: one a row, or several where a row is cut into windows; then
    the column `row` says for each item which row it is of. `logits` below are a sequence with an array for each item.

    Attributes:
        name: of the task; of one of the user's own, the path of its file.
        auto_class: transformers' class that its models have.
        peft_type: what PEFT calls the task, in an exported adapter; None leaves it PEFT's plain model.
        keys: of the recipe, that not all tasks have.
        columns: every column that the task can use, with the other names that it commonly has.
        required: those that rows must have.
        instead: what rows may have in place of these, for messages.
        inputs: those that the model reads.
        target: the column that holds what is to be predicted.
        answer: the key of a prediction that is compared with it.
        metrics: name -> "maximize" or "minimize"; the first is the task's own.
        hints: the names that the user's own columns have.
        per_token: whether logits have a place for every token, [tokens, ...] an item.
        windowed: whether rows longer than the model can take are read in several windows, and not cut.
        pooled: whether a row's mean hidden state says something of its target, as baselines on frozen features need:
            then there are `joined`, `judged` and `told` too.
        writes: whether a model answers with a text, token by token: then `logits` below are the tokens that it wrote.
        generate_on: on how many validation rows it writes during training, where it writes; None means all.
    """

    name: str
    auto_class: ClassVar[str]
    peft_type: ClassVar[str | None] = None
    keys: tuple[str, ...] = ()
    columns: ClassVar[dict[str, tuple[str, ...]]]
    required: tuple[str, ...]
    instead: ClassVar[str] = ""
    inputs: tuple[str, ...]
    target: ClassVar[str]
    answer: ClassVar[str]
    metrics: dict[str, str]
    hints: dict[str, str]
    per_token: ClassVar[bool] = False
    pooled: ClassVar[bool] = False
    windowed: ClassVar[bool] = False
    writes: ClassVar[bool] = False
    generate_on: int | None = None

    @classmethod
    @abstractmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """Makes the task from what the user asked for."""

    @abstractmethod
    def check(self, splits: dict[str, Dataset], sources: dict[str, str]) -> tuple[dict[str, Dataset], list[Finding]]:
        """Checks and repairs the rows, and learns from train what the task needs to know."""

    def recheck(self, rows: Dataset, source: str) -> tuple[Dataset, list[Finding]]:
        """Checks and repairs rows that a tuned model is to be scored on, as `check` does with those of test.

        Args:
            rows: with the task's columns.
            source: what `describe` returned, for messages.

        Returns:
            The rows, none of them left out, and what was found. They are as they came where a task does not say how.
        """
        return rows, []

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All of the task as plain JSON, for the manifest: its name, and the arguments of its class."""

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """Makes the task from a manifest."""
        return cls(**{key: value for key, value in state.items() if key != "name"})

    @abstractmethod
    def model_config(self) -> dict[str, Any]:
        """Values that the model's configuration gets, such as num_labels."""

    @abstractmethod
    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Makes model and tokenizer fit the task (a missing pad token, the padding side).

        Raises:
            ModelError: they cannot do it.
        """

    def remarks(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
        """What a user should know of how this model is asked: words, and whether "info" or "warning"."""
        return []

    @abstractmethod
    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> Dataset:
        """Turns rows into items, unpadded and truncated.

        Returns:
            The columns that the model takes, `labels` where rows have targets, `length` (in tokens, before truncation),
            `unknown` (how many of them the tokenizer does not know), `row` where a row may have several items, and
            whatever `decode` needs to know.
        """

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> DataCollatorWithPadding:
        """Pads items to a batch."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def logits(self, output: Any) -> torch.Tensor:
        """What is kept of a model's outputs (in order, without a loss), [items, ...] or [items, tokens, ...]."""
        found: torch.Tensor = output if hasattr(output, "shape") else output[0]
        return found

    def questions(self, items: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """What a model is given of items that it is to answer."""
        return for_the_model(items, tokenizer)

    def respond(self, model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """How a model answers a batch: its logits, or the tokens of the texts that it writes, [items, tokens].

        Args:
            model: in evaluation mode.
            batch: `questions`, padded on the right.
        """
        return self.logits(model(**batch))

    def target_limit(self, limit: int) -> int | None:
        """How many tokens of a target are learnt, where it is a text; `limit` is how many a row may have."""
        return None

    def difference(self, ours: Logits, theirs: Logits) -> float:
        """By how much two models' answers to the same items differ: at most, or by share of the items."""
        return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))

    def ready(self, model: PreTrainedModel) -> None:  # noqa: B027
        """Makes a model give what `loss` takes, where it does not by itself."""

    def with_labels(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch as `loss` wants it, where transformers' models call the labels otherwise."""
        return batch

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels as their number is counted: -100 is none."""
        return labels

    @abstractmethod
    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """The sum of the loss over the labels, divided by their number in the whole global batch (or here)."""

    @abstractmethod
    def decode(self, logits: Logits, items: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        """What `predict` gives for each row."""

    @abstractmethod
    def row_stats(self, logits: Logits, items: Dataset, rows: Dataset) -> Stats:
        """Per row, all that the metrics are computed from; the first dimension of each array is the rows."""

    @abstractmethod
    def aggregate(self, stats: Stats) -> dict[str, float]:
        """The metrics of these rows."""

    def intervals(self, stats: Stats) -> dict[str, Interval]:
        """The metrics with their 95% intervals."""
        return measures.intervals(stats, self.aggregate)

    def gold(self, rows: Dataset) -> list[Any]:
        """For each row what a prediction's `answer` is compared with, in metrics of the user's own and in files."""
        found: list[Any] = rows[self.target][:]
        return found

    @abstractmethod
    def right(self, stats: Stats) -> np.ndarray:
        """For each row whether it is all right, for tests that count right rows."""

    def fitted(self, logits: Logits, items: Dataset, rows: Dataset) -> Self:
        """The task with what is fitted on validation rows after training, such as a threshold; itself if nothing is."""
        return self

    @property
    def fits(self) -> bool:
        """Whether `fitted` has anything to do."""
        return False

    @abstractmethod
    def baselines(
        self, train: Dataset, test: Dataset, features: tuple[np.ndarray, np.ndarray] | None
    ) -> Sequence[Baseline | tuple[str, str, Stats]]:
        """What a tuned model has to beat.

        Args:
            train: rows to learn from.
            test: rows to predict.
            features: frozen ones of both, float32 [rows, width], where the task is `pooled`.
        """

    def joined(self, rows: Dataset) -> list[str]:
        """Each row as one text."""
        raise NotImplementedError

    def judged(self, rows: Dataset) -> tuple[Kind, np.ndarray]:
        """What the doubtful targets are looked for in: "classes" [rows], "labels" (0 and 1, [rows, labels]) or "values"
        [rows]."""
        raise NotImplementedError

    def told(self, target: Any) -> Any:
        """One of `judged` as the user knows it."""
        raise NotImplementedError

    @abstractmethod
    def profile(self, splits: dict[str, Dataset]) -> dict[str, Any]:
        """What data.json says of the targets."""

    @abstractmethod
    def errors(self, stats: Stats, rows: Dataset, predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """What evaluation.json says of where the model is wrong."""

    def looks(self, stats: Stats) -> list[str]:
        """What is odd about the predictions as such, whatever was right: a sentence each."""
        return []

    def kept(self, metrics: dict[str, Any]) -> list[tuple[str, bool]]:
        """What was asked for beside the goal: in a sentence each how rows stand to it, and whether they keep it.

        Args:
            metrics: of these rows, as evaluation.json has them.
        """
        return []

    @property
    def doubts(self) -> list[str]:
        """What should be said of what was fitted."""
        return []

    @property
    def reading(self) -> str:
        """How logits of a model that was handed over are to be read, where that is not plain; goes into its README."""
        return ""

    @abstractmethod
    def strata(self, rows: Dataset) -> Sequence[Sequence[Hashable]] | None:
        """What each row is of, as its labels: held-out parts get as much of every first one as there is, and all stand
        in a row that is kept. None where all rows are alike. Rows may not have been checked."""

    @abstractmethod
    def say(self, prediction: dict[str, Any]) -> str:
        """A prediction in a few words."""

    @property
    def apart(self) -> tuple[str, ...]:
        """Rows that are equal in these columns stay on one side where a part is held out."""
        return self.inputs

    def unpack(self, table: Dataset) -> Dataset:
        """A table as it was read, with what nested columns hold in columns of their own."""
        return table

    def look_at(self, columns: Sequence[str]) -> None:  # noqa: B027
        """Is told of the columns that a file has, before those that are required are looked for."""

    def has(self, name: str, columns: Sequence[str]) -> bool:
        """Whether one of a file's columns is what the task calls `name`."""
        lower = {column.strip().lower() for column in columns}
        return bool({name, *self.columns[name]} & lower) or self.hints.get(name) in columns

    def gather(self, rows: Dataset) -> Dataset:
        """Rows whose columns have the task's names, with the columns that it works on, where they are not these.

        Raises:
            DataError: they cannot be made of a row.
        """
        return rows

    def asked(self, columns: Sequence[str], labelled: bool) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Which of `columns` a file has to have, and which it may have.

        Args:
            columns: of the file, and what the user says that it has.
            labelled: whether its rows have targets; else they are to be predicted.
        """
        return (self.required, tuple(self.columns)) if labelled else (self.inputs, self.inputs)

    def chosen(self) -> dict[str, Any]:
        """Values of the task's own `keys` that neither recipe nor data say, for the recipe that a run keeps; once a
        model was prepared, which may have values of its own."""
        return {}

    def target_mend(self, limit: int) -> str:
        """What has a model learn more of a long target than `target_limit`."""
        return ""

    def lacking(self, rows: Dataset) -> np.ndarray:
        """Which rows have no target to learn, bool [rows], though the check only leaves them out of train.

        They are not held out either, where their target would be missed.
        """
        return np.zeros(len(rows), bool)

    def sifted(self, items: Dataset, rows: Dataset, split: str, limit: int) -> tuple[Dataset, list[Finding]]:
        """Items without those of train that nothing can be learnt from, and what should be said of them.

        Args:
            items: what `encode` has made of the rows.
            rows: which they are of.
            split: whose.
            limit: of tokens.
        """
        return items, []

    def answered(self, items: Dataset) -> Dataset:
        """The items that a model is to answer, one a row, where it writes."""
        return items

    @property
    def metric(self) -> str:
        """The task's own metric, where the goal names none."""
        return next(iter(self.metrics))

    def rows_from(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """Rows from what `predict` was given: dicts of the task's columns, or bare values where one column is all."""
        return [item if isinstance(item, dict) else {self.inputs[0]: item} for item in inputs]

    def problem(self, column: str, value: Any) -> str | None:
        """Why a value cannot stand in an input column, or None."""
        if value is None:
            return "is missing"
        return "is not a text" if isinstance(value, (list, dict)) else None

    @classmethod
    def suits(cls, model: Any) -> bool:
        """Whether a model was made for this task, by the name of its class."""
        return type(model).__name__.endswith(cls.auto_class.removeprefix("AutoModel"))


def names() -> list[str]:
    """Names of the tasks that the package brings."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if name not in _NO_TASKS and not name.startswith("_"))


def load(name: str) -> type[Task]:
    """Finds a task by its name, or by the path of its file.

    Raises:
        RecipeError: there is no such task, or the file offers none.
    """
    if own_file.is_path(name):
        made = getattr(own_file.load(name, "task", RecipeError), "Task", None)
        if not (isinstance(made, type) and issubclass(made, Task)):
            raise RecipeError(f"task: {name}: offers no class Task that is a hybridtune.tasks.Task")
        lacks = sorted(getattr(made, "__abstractmethods__", ()))
        if lacks:
            raise RecipeError(
                f"task: {name}: its Task lacks {', '.join(lacks)}",
                mend="the contract stands in hybridtune/tasks/__init__.py; the class may inherit from another task's",
            )
        own: type[Task] = type(made.__name__, (made,), {"name": own_file.absolute(name), "__module__": made.__module__})
        return own
    if name not in names():
        raise RecipeError(
            f"task: {unknown('task', name, names())}",
            at=("task",),
            given=name,
            expected=", ".join(names()) + ", or a path such as ./mine.py",
        )
    task: type[Task] = importlib.import_module(f".{name}", __name__).Task
    return task


def of(recipe: Recipe) -> Task:
    """Makes the task that a recipe asks for.

    Raises:
        RecipeError: there is no such task, or a key of the recipe is of other tasks only.
    """
    task = load(recipe.task)
    others = {key for name in names() for key in load(name).keys} - set(task.keys)
    for key in sorted(others & recipe.model_fields_set):
        if getattr(recipe, key) is not None:
            which = ", ".join(name for name in names() if key in load(name).keys)
            raise RecipeError(
                f"{key}: is not of the task {recipe.task}",
                at=(key,),
                given=getattr(recipe, key),
                expected=f"task: {which}",
                mend="leave it away",
            )
    return task.from_recipe(recipe)


def from_state(state: dict[str, Any]) -> Task:
    """Makes a task from what a manifest says.

    Raises:
        RecipeError: it was a file of the user's own, which is not there any more.
    """
    return load(state["name"]).from_state(state)


def for_the_model(items: Dataset, tokenizer: PreTrainedTokenizerBase, *, labels: bool = False) -> Dataset:
    """The columns of encoded rows that a model takes; the others are for `decode`."""
    wanted = {*tokenizer.model_input_names, *(("labels",) if labels else ())}
    return items.select_columns([name for name in items.column_names if name in wanted])


def for_model(model: Any) -> type[Task] | None:
    """The task that a transformers model is made for, or None."""
    return next((task for task in map(load, names()) if task.suits(model)), None)


def peft_type(auto_class: str) -> str | None:
    """What PEFT calls the task of a model class."""
    if auto_class == "AutoModelForCausalLM":  # the other class of tasks whose models write, see `model.load`
        return "CAUSAL_LM"
    return next((task.peft_type for task in map(load, names()) if task.auto_class == auto_class), None)
