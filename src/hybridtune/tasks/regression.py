"""Text regression: one number a row, or several, from one text or a pair."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from datasets import Dataset

from ..data.checking import check
from ..errors import DataError
from . import Baseline, Kind, Logits, Stats, baselines, metrics
from ._texts import TextTask, regresses

if TYPE_CHECKING:
    import torch

    from ..data.checking.findings import Finding
    from ..recipe import Recipe

STRATA = 10  # tenths of the target: held-out parts get as much of each
SHOWN = 10
EXAMPLE = 300  # characters


class Task(TextTask):
    """Regression. The model learns (target - mean) / spread of train, so that a learning rate means the same for prices
    as for grades; what is predicted and measured is in the target's own unit.

    Args:
        mean, spread: of the training rows' targets, one value for each number of a row.
        several: whether a row has a list of numbers.
    """

    name = "regression"
    answer = "value"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        **TextTask.columns,
        "label": ("labels", "score", "target", "value", "rating", "stars", "similarity_score", "y"),
    }

    def __init__(
        self,
        mean: Sequence[float] = (0.0,),
        spread: Sequence[float] = (1.0,),
        *,
        several: bool = False,
        template: str | None = None,
        pairs: bool = False,
        hints: dict[str, str] | None = None,
    ) -> None:
        super().__init__(template=template, pairs=pairs, hints=hints)
        self.mean, self.spread, self.several = list(mean), list(spread), several
        self.metrics = {"mse": "minimize", "mae": "minimize", "pearson": "maximize", "spearman": "maximize"}

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """Reads template and the columns' names."""
        return cls(**cls.of_texts(recipe))

    @classmethod
    def suits(cls, model: Any) -> bool:
        """A sequence classifier with one label, or told to do regression."""
        return super().suits(model) and regresses(model)

    def check(
        self, splits: dict[str, Dataset], sources: dict[str, str]
    ) -> tuple[dict[str, Dataset], list[check.Finding]]:
        """Checks rows and numbers; learns mean and spread of train."""
        splits, findings = check.check_regression(self.find_pairs(splits, sources), sources=sources)
        first = splits["train"]["label"][0]
        self.several = isinstance(first, list)
        self.mean = [0.0] * (len(first) if self.several else 1)  # as many as `numbers` is to expect
        targets = self.numbers(splits["train"])
        self.mean = targets.mean(0).tolist()
        self.spread = [float(spread) or 1.0 for spread in targets.std(0)]
        return splits, findings

    def recheck(self, rows: Dataset, source: str) -> tuple[Dataset, list[Finding]]:
        """As test rows are when tuning."""
        splits = {"test": self.of_inputs(rows)}
        splits, findings = check.check_regression(splits, sources={"test": source}, width=len(self.mean))
        return splits["test"], findings

    def state(self) -> dict[str, Any]:
        """Mean and spread of the targets, and how texts are put together."""
        return {**super().state(), "mean": self.mean, "spread": self.spread, "several": self.several}

    def model_config(self) -> dict[str, Any]:
        """How many numbers, and what they are to be multiplied with and added to."""
        return {
            "num_labels": len(self.mean),
            "problem_type": "regression",
            "task_specific_params": {"regression": {"mean": self.mean, "spread": self.spread}},
        }

    def numbers(self, rows: Dataset) -> np.ndarray:
        """The targets in their own unit, float64 [rows, numbers].

        Raises:
            DataError: a row has none, or more or fewer than the others.
        """
        width = len(self.mean)
        found = []
        for value, row in zip(rows["label"][:], rows["_row"][:], strict=True):
            numbers = [_number(one) for one in (value if isinstance(value, list) else [value])]
            if len(numbers) != width or not all(map(math.isfinite, numbers)):
                raise DataError(
                    f"row {row}: the label is " + ("missing" if value is None else "not what the model predicts"),
                    found=value,
                    expected="a number" if width == 1 else f"a list of {width} numbers",
                )
            found.append(numbers)
        return np.array(found, dtype=np.float64).reshape(len(found), width)

    def targets(self, rows: Dataset) -> np.ndarray:
        """Targets in units of their spread, [rows, numbers]."""
        return ((self.numbers(rows) - self.mean) / self.spread).astype(np.float32)

    def judged(self, rows: Dataset) -> tuple[Kind, np.ndarray]:
        """The targets, of several numbers a row the first."""
        return "values", self.numbers(rows)[:, 0]

    def told(self, target: Any) -> Any:
        """The number."""
        return round(float(target), 4)

    def counted(self, labels: torch.Tensor) -> torch.Tensor:
        """Every number, -100 too."""
        return labels.new_zeros(labels.shape)

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Squared error, summed, over the numbers of the global batch."""
        from torch.nn.functional import mse_loss

        logits = outputs["logits"].float()
        total = mse_loss(logits, labels.to(logits).view_as(logits), reduction="sum")
        return total / (labels.numel() if num_items_in_batch is None else num_items_in_batch)

    def _predicted(self, logits: Logits) -> np.ndarray:
        return np.asarray(logits, dtype=np.float64).reshape(len(logits), -1) * self.spread + self.mean

    def decode(self, logits: Logits, items: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        """`value`: a number, or a list of them."""
        return [{"value": value} for value in self._values(self._predicted(logits))]

    def _values(self, predicted: np.ndarray) -> list[Any]:
        values = [[round(float(one), 6) for one in row] for row in predicted]
        return [row if self.several else row[0] for row in values]

    @property
    def reading(self) -> str:
        """What the numbers are."""
        return f"A number is its logit times {self.spread} plus {self.mean}; `hybridtune predict` gives it so."

    def say(self, prediction: dict[str, Any]) -> str:
        """The numbers."""
        value = prediction["value"]
        return ", ".join(f"{one:.4g}" for one in (value if isinstance(value, list) else [value]))

    def row_stats(self, logits: Logits, items: Dataset, rows: Dataset) -> Stats:
        """Gold and predicted numbers of each row, in the target's own unit."""
        return {"gold": self.numbers(rows), "predicted": self._predicted(logits)}

    def aggregate(self, stats: Stats) -> dict[str, float]:
        """Squared and absolute error, and correlations; of several numbers a row, the mean over them."""
        return metrics.regression_metrics(stats)

    def right(self, stats: Stats) -> np.ndarray:
        """Whether the prediction is off by less than half the spread of train."""
        return np.asarray((np.abs(stats["predicted"] - stats["gold"]) < np.array(self.spread) / 2).all(1))

    def strata(self, rows: Dataset) -> Sequence[Sequence[Hashable]]:
        """Which tenth of the targets a row is in, by its first number."""
        values = (value[0] if isinstance(value, list) and value else value for value in rows["label"][:])
        first = np.array([_number(value) for value in values])
        edges = np.nanquantile(first, np.linspace(0, 1, STRATA + 1)[1:-1]) if np.isfinite(first).any() else []
        return [(tenth,) for tenth in np.searchsorted(edges, first, side="right").tolist()]

    def baselines(
        self, train: Dataset, test: Dataset, features: tuple[np.ndarray, np.ndarray] | None
    ) -> list[Baseline]:
        """Mean, bag of words, and a linear regression on the frozen model's features."""
        texts = (self.joined(train), self.joined(test))
        gold, made = self.numbers(test), baselines.numbers_of_texts(texts, self.numbers(train), features)
        return [
            Baseline(name, detail, {"gold": gold, "predicted": predicted}, self._values(predicted))
            for name, detail, predicted in made
        ]

    def profile(self, splits: dict[str, Dataset]) -> dict[str, Any]:
        """Where the targets of each split lie; of several numbers a row, of each."""
        found = []
        for name, rows in splits.items():
            for at, values in enumerate(self.numbers(rows).T):
                low, median, high = np.quantile(values, [0, 0.5, 1]).tolist()
                spread = {"mean": float(values.mean()), "std": float(values.std())}
                which = {"number": at + 1} if self.several else {}
                found.append({"split": name, **which, "min": low, "median": median, "max": high, **spread})
        return {"targets": found}

    def errors(self, stats: Stats, rows: Dataset, predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The rows that are predicted worst, in units of the spread; of several numbers a row, the scores of each."""
        away = np.abs((stats["predicted"] - stats["gold"]) / self.spread).max(1)
        texts, numbers = self.joined(rows), rows["_row"][:]
        worst = [
            {
                "row": numbers[at],
                "text": texts[at][:EXAMPLE],
                "gold": rows["label"][int(at)],
                "predicted": predictions[at]["value"],
            }
            for at in np.argsort(-away, kind="stable")[:SHOWN]
        ]
        each = [
            {"number": at + 1, **metrics.regression_metrics({name: stats[name][:, at : at + 1] for name in stats})}
            for at in range(len(self.mean) if self.several else 0)
        ]
        return {**({"per_number": each} if each else {}), "worst_rows": worst}


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
