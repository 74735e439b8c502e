"""Metrics of the user's own: functions of a Python file, `metrics: ./mine.py`.

Every public function of the file, `name(gold, predicted) -> float`, is a metric of that name. Both are lists with an
entry for each row: the target as the data has it, and what `predict` says (a label, a number, an answer, tags).
More of it is better, unless the function has `name.direction = "minimize"`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset

from . import own_file
from .errors import RecipeError
from .tasks import Task
from .tasks.metrics import Interval, intervals

TRIED_ROWS = 20
DIRECTIONS = ("maximize", "minimize")


@dataclass(frozen=True)
class OwnMetrics:
    """The functions by their names, and the file that each is from."""

    functions: dict[str, Callable[[list[Any], list[Any]], float]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, files: str | Sequence[str] | None, task: Task) -> OwnMetrics:
        """Reads the files.

        Raises:
            RecipeError: a file is missing, cannot be run, or has no such functions; a name is a metric already.
        """
        functions: dict[str, Callable[[list[Any], list[Any]], float]] = {}
        where: dict[str, str] = {}
        for file in [files] if isinstance(files, str) else files or []:
            module = own_file.load(file, "metrics", RecipeError)
            own = {
                name: function
                for name, function in vars(module).items()
                if inspect.isfunction(function) and function.__module__ == module.__name__ and not name.startswith("_")
            }
            if not own:
                raise RecipeError(f"metrics: {file}: has no public function", expected="def NAME(gold, predicted)")
            for name, function in own.items():
                if name in where or name in (*task.metrics, "loss"):
                    raise RecipeError(
                        f"metrics: {file}: {name} is a metric already", mend="call the function otherwise"
                    )
                way = getattr(function, "direction", DIRECTIONS[0])
                if way not in DIRECTIONS:
                    raise RecipeError(f"metrics: {file}: {name}.direction", found=way, expected=" or ".join(DIRECTIONS))
            functions |= own
            where |= dict.fromkeys(own, file)
        return cls(functions, where)

    @property
    def directions(self) -> dict[str, str]:
        """Name -> maximize or minimize."""
        return {name: getattr(function, "direction", DIRECTIONS[0]) for name, function in self.functions.items()}

    def try_out(self, task: Task, rows: Dataset) -> None:
        """Calls every function with right answers, now and not after hours.

        Raises:
            RecipeError: one of them fails, or gives no number.
        """
        some = task.gold(rows.select(range(min(TRIED_ROWS, len(rows))))) if self.functions else []
        for name in self.functions:
            self._call(name, some, some)

    def measure(self, task: Task, predictions: Sequence[dict[str, Any]], rows: Dataset) -> dict[str, float]:
        """The metrics of these rows."""
        gold, predicted = task.gold(rows), [one[task.answer] for one in predictions]
        return {name: self._call(name, gold, predicted) for name in self.functions}

    def intervals(self, gold: Sequence[Any], predicted: Sequence[Any]) -> dict[str, Interval]:
        """The metrics of these answers with 95% intervals, by bootstrap over the rows."""
        if not self.functions:
            return {}

        def of_rows(stats: dict[str, np.ndarray]) -> dict[str, float]:
            some = stats["row"].tolist()
            drawn = [gold[row] for row in some], [predicted[row] for row in some]
            return {name: self._call(name, *drawn) for name in self.functions}

        return intervals({"row": np.arange(len(gold))}, of_rows)

    def _call(self, name: str, gold: list[Any], predicted: list[Any]) -> float:
        try:
            return float(self.functions[name](list(gold), list(predicted)))
        except Exception as error:  # whatever a user's function may raise
            raise RecipeError(
                f"metrics: {self.files[name]}: {name} fails on {len(gold)} rows",
                found=f"{type(error).__name__}: {error}",
                expected="a number",
            ) from error


NO_METRICS = OwnMetrics()
