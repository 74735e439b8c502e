"""Text classification: binary, many classes, several labels a row, one text or a pair."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from datasets import Dataset

from ..data.checking import check
from ..data.checking.labels import label_lists, separators_of
from ..errors import DataError, RecipeError, unknown
from . import Baseline, Kind, Logits, Stats, baselines, metrics
from ._texts import TextTask, regresses
from .metrics import Interval

if TYPE_CHECKING:
    import torch

    from ..data.checking.findings import Finding
    from ..recipe import Recipe


CURVE_POINTS = 100


class Task(TextTask):
    """Classification.

    Args:
        labels: the user's own names, strings or integers, in the order of the logits.
        multi_label: whether a row may have several labels, or none.
        class_weight: as asked for; `weights` are the numbers, one a label.
        abstain: {"accuracy": 0.95} or {"coverage": 0.9}: when no label is given.
        threshold: below it none is; fitted on validation rows, where `reached` of the labels above it are right.
        separators: what stands between several labels in a text.
        renamed: other ways of writing labels that train had -> what they are called.
    """

    name = "classification"
    answer = "label"
    keys = (*TextTask.keys, "multi_label", "class_weight", "abstain")
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        **TextTask.columns,
        "label": ("labels", "intent", "class", "category", "target", "sentiment"),
    }

    def __init__(
        self,
        labels: Sequence[Any] = (),
        *,
        multi_label: bool = False,
        template: str | None = None,
        class_weight: str | dict[str, float] | None = None,
        weights: Sequence[float] | None = None,
        pairs: bool = False,
        hints: dict[str, str] | None = None,
        separators: str | None = None,
        abstain: dict[str, float] | None = None,
        threshold: float = 0.0,
        reached: float | None = None,
        renamed: dict[str, str] | None = None,
    ) -> None:
        super().__init__(template=template, pairs=pairs, hints=hints)
        self.labels, self.multi_label, self.separators = list(labels), multi_label, separators
        self.class_weight, self.weights = class_weight, list(weights) if weights else None
        names = ("macro_f1", "accuracy", "micro_f1") if multi_label else ("macro_f1", "accuracy", "weighted_f1", "mcc")
        self.metrics = dict.fromkeys(names, "maximize")
        self.abstain, self.threshold, self.reached = abstain, threshold, reached
        self.renamed = dict(renamed or {})

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """Reads multi_label, template, class_weight, abstain and the columns' names."""
        if recipe.abstain and recipe.multi_label:
            raise RecipeError(
                "abstain: a row that may have several labels may have none", mend="leave abstain or multi_label away"
            )
        return cls(
            multi_label=bool(recipe.multi_label),
            class_weight=recipe.class_weight,
            abstain=recipe.abstain.model_dump(exclude_none=True) if recipe.abstain else None,
            **cls.of_texts(recipe),
        )

    @classmethod
    def suits(cls, model: Any) -> bool:
        """A sequence classifier that is no regression."""
        return super().suits(model) and not regresses(model)

    def check(
        self, splits: dict[str, Dataset], sources: dict[str, str]
    ) -> tuple[dict[str, Dataset], list[check.Finding]]:
        """Checks rows and labels; learns the label names and, where asked for, their weights."""
        splits = self.find_pairs(splits, sources)
        if self.multi_label and "label" in splits["train"].column_names:
            self.separators = separators_of(splits["train"]["label"][:])  # rows to come are cut as these are
        splits, findings = check.check_classification(
            splits,
            sources=sources,
            multi_label=self.multi_label,
            separators=self.separators,
            renamed=self.renamed,
        )
        if not self.labels:
            self.labels = check.label_names(splits["train"], self.multi_label)
        if self.class_weight:
            self.weights = self._class_weights(splits["train"])
        return splits, findings

    def recheck(self, rows: Dataset, source: str) -> tuple[Dataset, list[Finding]]:
        """As test rows are when tuning."""
        splits, findings = check.check_classification(
            {"test": self.of_inputs(rows)},
            sources={"test": source},
            multi_label=self.multi_label,
            separators=self.separators,
            labels=self.labels,
            renamed=self.renamed,
        )
        return splits["test"], findings

    def _class_weights(self, train: Dataset) -> list[float]:
        """Balanced: n / (k n_c), whose mean over the training rows is one, so that the rate keeps its meaning."""
        counts = (
            self._multi_hot(train).sum(0)
            if self.multi_label
            else np.bincount(self._indices(train), minlength=len(self.labels))
        )
        if self.class_weight == "balanced" and self.multi_label:  # of each label, as much with as without it
            return [float((len(train) - count) / max(count, 1)) for count in counts]
        if self.class_weight == "balanced":
            return [float(counts.sum() / (len(self.labels) * count)) for count in np.maximum(counts, 1)]
        assert isinstance(self.class_weight, dict)
        known = [str(name) for name in self.labels]
        for name, weight in self.class_weight.items():
            if name not in known:
                raise RecipeError(f"class_weight: {unknown('label', name, known)}", expected=", ".join(known))
            if weight < 0:
                raise RecipeError(f"class_weight: {name} has a weight below zero", found=weight)
        return [float(self.class_weight.get(str(name), 1.0)) for name in self.labels]

    def state(self) -> dict[str, Any]:
        """Label names and how texts are put together."""
        return {
            **super().state(),
            "labels": self.labels,
            "multi_label": self.multi_label,
            "class_weight": self.class_weight,
            "weights": self.weights,
            "separators": self.separators,
            "renamed": self.renamed,
            "abstain": self.abstain,
            "threshold": self.threshold,
            "reached": self.reached,
        }

    def model_config(self) -> dict[str, Any]:
        """Number and names of the labels, and which loss they mean."""
        return {
            "num_labels": len(self.labels),
            "id2label": {number: str(label) for number, label in enumerate(self.labels)},
            "label2id": {str(label): number for number, label in enumerate(self.labels)},
            "problem_type": "multi_label_classification" if self.multi_label else "single_label_classification",
        }

    def targets(self, rows: Dataset) -> np.ndarray:
        """Numbers of the labels; where a row may have several, 0 or 1 for each label."""
        return self._multi_hot(rows).astype(np.float32) if self.multi_label else self._indices(rows)

    def _indices(self, rows: Dataset) -> np.ndarray:
        number = {label: index for index, label in enumerate(self.labels)}
        return np.array(
            [
                number[self._known(labels[0] if labels else None, row, number)]
                for labels, row in zip(label_lists(rows["label"][:], False), rows["_row"][:], strict=True)
            ],
            dtype=np.int64,
        )

    def _multi_hot(self, rows: Dataset) -> np.ndarray:
        number = {label: index for index, label in enumerate(self.labels)}
        hot = np.zeros((len(rows), len(self.labels)), dtype=np.int64)
        found = label_lists(rows["label"][:], True, self.separators)
        for at, (labels, row) in enumerate(zip(found, rows["_row"][:], strict=True)):
            hot[at, [number[self._known(label, row, number)] for label in labels]] = 1
        return hot

    def _known(self, label: Any, row: int, number: dict[Any, int]) -> Any:
        """The label as the model knows it: a file of text gives "3" where the model was trained on 3."""
        if label is None:
            raise DataError(f"row {row}: the row has no label", mend="label it, or take it out of the file")
        if isinstance(label, list):
            raise DataError(f"row {row}: the label is a list", found=label, expected="one label a row")
        if label in number:
            return label
        same = [known for known in self.labels if str(known) == str(label).strip()]
        if not same:
            raise DataError(
                f"row {row}: {unknown('label', str(label), map(str, self.labels))}",
                expected=", ".join(map(str, self.labels))[:300],
                mend="correct the row, or tune with rows of that label",
            )
        return same[0]

    def judged(self, rows: Dataset) -> tuple[Kind, np.ndarray]:
        """Numbers of the labels."""
        return ("labels", self._multi_hot(rows)) if self.multi_label else ("classes", self._indices(rows))

    def told(self, target: Any) -> Any:
        """Names of the labels."""
        return [self.labels[at] for at in target] if self.multi_label else self.labels[target]

    def loss(
        self, outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Cross-entropy (several labels: binary cross-entropy), summed, over the items of the global batch."""
        from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

        logits = outputs["logits"].float()
        weight = logits.new_tensor(self.weights) if self.weights else None
        labels = labels.to(logits.device)
        if labels.dim() > 1 and labels.is_floating_point():
            total = binary_cross_entropy_with_logits(logits, labels, pos_weight=weight, reduction="sum")
            items = labels.numel()
        else:
            total, items = (
                cross_entropy(logits, labels.view(-1), weight=weight, reduction="sum"),
                int(labels.ne(-100).sum()),
            )
        return total / (items if num_items_in_batch is None else num_items_in_batch)

    def decode(self, logits: Logits, items: Dataset, rows: Dataset) -> list[dict[str, Any]]:
        """`label` (several labels: a list, those at 0.5 and above; None below the threshold) and all labels' scores."""
        outputs = np.asarray(logits)
        scores = 1 / (1 + np.exp(-outputs)) if self.multi_label else _softmax(outputs)
        decoded = []
        for row in scores:
            label: Any = (
                [self.labels[n] for n in np.flatnonzero(row >= 0.5)]
                if self.multi_label
                else self.labels[int(row.argmax())]
                if row.max() >= self.threshold
                else None
            )
            decoded.append(
                {
                    "label": label,
                    "scores": {str(name): round(float(score), 6) for name, score in zip(self.labels, row, strict=True)},
                }
            )
        return decoded

    def say(self, prediction: dict[str, Any]) -> str:
        """The label and its score."""
        if prediction["label"] is None:
            best, score = max(prediction["scores"].items(), key=lambda item: item[1])
            return f"no label (best: {best}, {score:.0%})"
        score = prediction["scores"].get(str(prediction["label"]))
        return f"{prediction['label']}" + (f" ({score:.0%})" if score is not None else "")

    def row_stats(self, logits: Logits, items: Dataset, rows: Dataset) -> Stats:
        """Gold and predicted label of each row, and the score of the latter where the model may abstain."""
        outputs, labels = np.asarray(logits), np.asarray(items["labels"][:])
        predicted = (outputs >= 0).astype(np.int64) if self.multi_label else outputs.argmax(-1)
        found = {"gold": labels.astype(np.int64), "predicted": predicted}
        return {**found, "score": _softmax(outputs).max(-1)} if self.abstain else found

    def right(self, stats: Stats) -> np.ndarray:
        """Whether the label, or all of several, are the right ones."""
        same = stats["gold"] == stats["predicted"]
        return np.asarray(same.all(1) if self.multi_label else same)

    def strata(self, rows: Dataset) -> Sequence[Sequence[Hashable]]:
        """The labels."""
        found = label_lists(rows["label"][:], self.multi_label)
        return [[str(one) if isinstance(one, (list, dict)) else one for one in labels] for labels in found]

    def aggregate(self, stats: Stats) -> dict[str, float]:
        """Accuracy, macro-F1 and others, 0 to 1: of all rows, whether the model abstains or not."""
        return {**metrics.classification_metrics(stats), **self._answered(stats)}

    def _answered(self, stats: Stats) -> dict[str, float]:
        """Where the model may abstain: the share of rows that get a label, and the share of those that is right."""
        if "score" not in stats:
            return {}
        given = stats["score"] >= self.threshold
        right = stats["gold"][given] == stats["predicted"][given]
        return {"coverage": float(given.mean()), "answered_accuracy": float(right.mean()) if len(right) else 1.0}

    def intervals(self, stats: Stats) -> dict[str, Interval]:
        """Wilson for accuracy, BCa bootstrap for the others."""
        found = metrics.classification_intervals(stats, self.labels)
        return {**found, **metrics.intervals(stats, self._answered)} if self.abstain else found

    @property
    def fits(self) -> bool:
        """Where the model may abstain, when it does."""
        return self.abstain is not None

    def fitted(self, logits: Logits, items: Dataset, rows: Dataset) -> Self:
        """With the threshold that `abstain` asks for on these rows, or the nearest to it that there is."""
        assert self.abstain is not None
        points = metrics.coverage_curve(self.row_stats(logits, items, rows))
        if "coverage" in self.abstain:
            chosen = next(point for point in points if point["coverage"] >= self.abstain["coverage"])
        else:
            reached = [point for point in points if point["accuracy"] >= self.abstain["accuracy"]]
            chosen = reached[-1] if reached else max(points, key=lambda point: point["accuracy"])
        return self.from_state({**self.state(), "threshold": chosen["threshold"], "reached": chosen["accuracy"]})

    def kept(self, metrics: dict[str, Any]) -> list[tuple[str, bool]]:
        """How many rows get a label, and how many of these are right, beside what `abstain` asks for."""
        if not self.abstain:
            return []
        coverage, right = metrics["coverage"]["value"], metrics["answered_accuracy"]["value"]
        wanted, asked = next(iter(self.abstain.items()))
        told = f"{coverage:.1%} of these rows, of which {right:.1%} are right" if coverage else "none of these rows"
        goal = f"{asked:.4g} of the labels right" if wanted == "accuracy" else f"a label for {asked:.4g} of the rows"
        fine = coverage > 0 and (right if wanted == "accuracy" else coverage) >= asked
        said = f"abstain: scores from {self.threshold:.3f} on (fitted on validation rows) get a label, {told}"
        return [(f"{said}; asked for was {goal}" + ("" if fine else ", which is missed here"), fine)]

    @property
    def doubts(self) -> list[str]:
        """That no threshold is as good as was asked for."""
        asked = (self.abstain or {}).get("accuracy")
        if asked is None or self.reached is None or self.reached >= asked:
            return []
        best = f"{self.reached:.0%} at best"
        return [f"abstain: no threshold leaves {asked:.0%} of the labels right on validation rows, {best}"]

    def baselines(
        self, train: Dataset, test: Dataset, features: tuple[np.ndarray, np.ndarray] | None
    ) -> list[Baseline]:
        """Majority class, bag of words, and a logistic regression on the frozen model's features."""
        numbers = self._multi_hot if self.multi_label else self._indices
        gold, texts = numbers(test), (self.joined(train), self.joined(test))
        made = baselines.of_texts(texts, numbers(train), features)
        return [
            Baseline(name, detail, {"gold": gold, "predicted": predicted}, self._named(predicted))
            for name, detail, predicted in made
        ]

    def _named(self, predicted: np.ndarray) -> list[Any]:
        """Numbers of labels, or 0 and 1 for each label, as `predict` gives them."""
        if self.multi_label:
            return [[self.labels[at] for at in np.flatnonzero(row)] for row in predicted]
        return [self.labels[at] for at in predicted]

    def profile(self, splits: dict[str, Dataset]) -> dict[str, Any]:
        """How often each label stands in each split."""
        return {"labels": check.label_table(splits, self.labels, self.multi_label)}

    def errors(self, stats: Stats, rows: Dataset, predictions: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Per-class table, confusion matrix and the worst confusions with examples."""
        found: dict[str, Any] = {"per_class": metrics.per_class(stats, self.labels)}
        if self.abstain:
            points = metrics.coverage_curve(stats)
            every = max(1, len(points) // CURVE_POINTS)
            found["abstain"] = {"asked": self.abstain, "threshold": self.threshold, "curve": points[::every]}
        if self.multi_label:
            return found
        matrix = np.array(metrics.confusion(stats, len(self.labels)))
        found["confusion"] = {"labels": self.labels, "matrix": matrix.tolist()}
        np.fill_diagonal(matrix, 0)
        worst = []
        texts, numbers = self.joined(rows), rows["_row"][:]
        for at in np.argsort(-matrix, axis=None, kind="stable")[:10]:
            gold, predicted = np.unravel_index(at, matrix.shape)
            if matrix[gold, predicted] == 0:
                break
            found_at = np.flatnonzero((stats["gold"] == gold) & (stats["predicted"] == predicted)).tolist()
            name = str(self.labels[predicted])
            hits = sorted(found_at, key=lambda row: -predictions[row]["scores"][name])[:3]
            examples = [
                {"row": numbers[hit], "text": texts[hit][:300], "score": predictions[hit]["scores"][name]}
                for hit in hits
            ]
            worst.append(
                {
                    "gold": self.labels[gold],
                    "predicted": self.labels[predicted],
                    "count": int(matrix[gold, predicted]),
                    "examples": examples,
                }
            )
        return {**found, "worst": worst}


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))
