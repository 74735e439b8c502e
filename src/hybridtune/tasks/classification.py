"""Text classification: binary, many classes, several labels a row, one text or a pair."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from datasets import Dataset

from .. import tasks
from ..data import check
from ..data.labels import label_lists, separators_of
from ..errors import DataError, ModelError, RecipeError, unknown
from . import Stats, baselines, metrics
from .metrics import Interval

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..recipe import Recipe


class Task(tasks.Task):
    """Classification; `labels` are the user's own names, strings or integers, in the order of the logits."""

    name = "classification"
    auto_class = "AutoModelForSequenceClassification"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "text": ("sentence", "sentence1", "message", "content", "review", "premise", "question1", "utterance", "tweet"),
        "text_pair": ("sentence2", "hypothesis", "question2"),
        "label": ("labels", "intent", "class", "category", "target", "sentiment"),
    }
    required: tuple[str, ...] = ("text", "label")
    inputs: tuple[str, ...] = ("text",)

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
    ) -> None:
        self.labels, self.multi_label, self.template = list(labels), multi_label, template
        self.class_weight, self.weights = class_weight, list(weights) if weights else None
        self.hints, self.separators = dict(hints or {}), separators
        self._take_pairs(pairs)
        names = ("macro_f1", "accuracy", "micro_f1") if multi_label else ("macro_f1", "accuracy", "weighted_f1", "mcc")
        self.metrics = dict.fromkeys(names, "maximize")

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Task:
        """Reads multi_label, template, class_weight and the columns' names."""
        if recipe.template is not None and "{text}" not in recipe.template:
            raise RecipeError(
                "template: has no place for the text", found=recipe.template, expected="such as: 'Message: {text}'"
            )
        return cls(
            multi_label=bool(recipe.multi_label),
            template=recipe.template,
            class_weight=recipe.class_weight,
            hints=recipe.data.columns,
        )

    def _take_pairs(self, pairs: bool) -> None:
        """Whether a row is a pair of texts: then both are needed, else a second text is no matter."""
        self.pairs = pairs
        self.inputs = ("text", "text_pair") if pairs else ("text",)
        self.required = (*self.inputs, "label")

    def check(
        self, splits: dict[str, Dataset], sources: dict[str, str]
    ) -> tuple[dict[str, Dataset], list[check.Finding]]:
        """Checks rows and labels; learns the label names and, where asked for, their weights."""
        self._take_pairs("text_pair" in splits["train"].column_names)
        for name, rows in splits.items():
            if self.pairs and "text_pair" not in rows.column_names:
                raise DataError(
                    f"{sources[name]} ({name}): there is no column for text_pair, but train has one",
                    found=", ".join(column for column in rows.column_names if column != "_row"),
                    mend="give every file both texts, or none",
                )
            if not self.pairs and "text_pair" in rows.column_names:
                splits = {**splits, name: rows.remove_columns("text_pair")}
        if self.template is not None and "{text_pair}" in self.template and not self.pairs:
            raise RecipeError("template: has a place for text_pair, but rows are no pairs", found=self.template)
        if self.multi_label and "label" in splits["train"].column_names:
            self.separators = separators_of(splits["train"]["label"][:])  # rows to come are cut as these are
        splits, findings = check.check_classification(
            splits, sources=sources, multi_label=self.multi_label, separators=self.separators
        )
        if not self.labels:
            self.labels = check.label_names(splits["train"], self.multi_label)
        if self.class_weight:
            self.weights = self._class_weights(splits["train"])
        return splits, findings

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
            "name": self.name,
            "labels": self.labels,
            "multi_label": self.multi_label,
            "template": self.template,
            "class_weight": self.class_weight,
            "weights": self.weights,
            "pairs": self.pairs,
            "hints": self.hints,
            "separators": self.separators,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Task:
        """Makes the task again."""
        return cls(**{key: value for key, value in state.items() if key != "name"})

    def model_config(self) -> dict[str, Any]:
        """Number and names of the labels, and which loss they mean."""
        return {
            "num_labels": len(self.labels),
            "id2label": {number: str(label) for number, label in enumerate(self.labels)},
            "label2id": {str(label): number for number, label in enumerate(self.labels)},
            "problem_type": "multi_label_classification" if self.multi_label else "single_label_classification",
        }

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Pads on the right, with the end token where a decoder brings no pad token.

        Decoders pool the last token that is not padding: the pad token must be known to the model too.
        """
        tokenizer.padding_side = "right"
        if tokenizer.pad_token_id is None:
            token = tokenizer.eos_token or tokenizer.unk_token
            if token is None:
                raise ModelError(
                    "the tokenizer has no pad, end or unknown token to pad with",
                    mend="add one: tokenizer.add_special_tokens({'pad_token': ...})",
                )
            tokenizer.pad_token = token
        model.config.pad_token_id = tokenizer.pad_token_id

    def texts(self, rows: Dataset) -> tuple[list[str], list[str] | None]:
        """The texts (and their pairs) that the tokenizer gets, the template filled in."""
        pairs = [_text(value) for value in rows["text_pair"][:]] if "text_pair" in rows.column_names else None
        texts = [_text(value) for value in rows["text"][:]]
        if self.template is None:
            return texts, pairs
        if pairs is not None and "{text_pair}" in self.template:
            return [_fill(self.template, text=t, text_pair=p) for t, p in zip(texts, pairs, strict=True)], None
        return [_fill(self.template, text=text) for text in texts], pairs

    def encode(self, rows: Dataset, tokenizer: PreTrainedTokenizerBase, limit: int) -> Dataset:
        """Token ids, unpadded; a pair is truncated at its longer side. An empty text is one pad token, not none."""
        texts, pairs = self.texts(rows)
        full = tokenizer(texts, pairs, truncation=False, verbose=False)
        encoded = tokenizer(texts, pairs, truncation=True, max_length=limit)
        columns: dict[str, Any] = {key: encoded[key] for key in encoded if key in tokenizer.model_input_names}
        for at in (at for at, ids in enumerate(encoded["input_ids"]) if not ids):
            fill = {"input_ids": tokenizer.pad_token_id, "attention_mask": 1}
            for key in columns:
                columns[key][at] = [fill.get(key, 0)]
        columns["length"] = [len(ids) for ids in full["input_ids"]]
        unknown_id = tokenizer.unk_token_id
        columns["unknown"] = [ids.count(unknown_id) if unknown_id is not None else 0 for ids in full["input_ids"]]
        if "label" in rows.column_names:
            columns["labels"] = self._multi_hot(rows).astype(np.float32) if self.multi_label else self._indices(rows)
        return Dataset.from_dict(
            {key: value if isinstance(value, list) else value.tolist() for key, value in columns.items()}
        )

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

    def decode(self, logits: np.ndarray) -> list[dict[str, Any]]:
        """`label` (several labels: a list, those at 0.5 and above) and the score of every label."""
        scores = 1 / (1 + np.exp(-logits)) if self.multi_label else _softmax(logits)
        decoded = []
        for row in scores:
            label: Any = (
                [self.labels[n] for n in np.flatnonzero(row >= 0.5)]
                if self.multi_label
                else self.labels[int(row.argmax())]
            )
            decoded.append(
                {
                    "label": label,
                    "scores": {str(name): round(float(score), 6) for name, score in zip(self.labels, row, strict=True)},
                }
            )
        return decoded

    def row_stats(self, logits: np.ndarray, labels: np.ndarray) -> Stats:
        """Gold and predicted label of each row."""
        if self.multi_label:
            return {"gold": labels.astype(np.int64), "predicted": (logits >= 0).astype(np.int64)}
        return {"gold": labels.astype(np.int64), "predicted": logits.argmax(-1)}

    def aggregate(self, stats: Stats) -> dict[str, float]:
        """Accuracy, macro-F1 and others, 0 to 1."""
        return metrics.classification_metrics(stats)

    def intervals(self, stats: Stats) -> dict[str, Interval]:
        """Wilson for accuracy, BCa bootstrap for the others."""
        return metrics.classification_intervals(stats, self.labels)

    def baselines(
        self, train: Dataset, test: Dataset, features: tuple[np.ndarray, np.ndarray] | None
    ) -> list[tuple[str, str, Stats]]:
        """Majority class, bag of words, and a logistic regression on the frozen model's features."""
        numbers = self._multi_hot if self.multi_label else self._indices
        gold, texts = numbers(test), (self._joined(train), self._joined(test))
        made = baselines.of_texts(texts, numbers(train), features)
        return [(name, detail, {"gold": gold, "predicted": predicted}) for name, detail, predicted in made]

    def _joined(self, rows: Dataset) -> list[str]:
        texts, pairs = self.texts(rows)
        return texts if pairs is None else [f"{text} {pair}" for text, pair in zip(texts, pairs, strict=True)]

    def profile(self, splits: dict[str, Dataset]) -> dict[str, Any]:
        """How often each label stands in each split."""
        return {"labels": check.label_table(splits, self.labels, self.multi_label)}

    def errors(self, stats: Stats, rows: Dataset, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Per-class table, confusion matrix and the worst confusions with examples."""
        found: dict[str, Any] = {"per_class": metrics.per_class(stats, self.labels)}
        if self.multi_label:
            return found
        matrix = np.array(metrics.confusion(stats, len(self.labels)))
        found["confusion"] = {"labels": self.labels, "matrix": matrix.tolist()}
        np.fill_diagonal(matrix, 0)
        worst = []
        texts, numbers = self._joined(rows), rows["_row"][:]
        for at in np.argsort(-matrix, axis=None, kind="stable")[:10]:
            gold, predicted = np.unravel_index(at, matrix.shape)
            if matrix[gold, predicted] == 0:
                break
            found_at = np.flatnonzero((stats["gold"] == gold) & (stats["predicted"] == predicted)).tolist()
            name = str(self.labels[predicted])
            hits = sorted(found_at, key=lambda row: -scores[row]["scores"][name])[:3]
            examples = [
                {"row": numbers[hit], "text": texts[hit][:300], "score": scores[hit]["scores"][name]} for hit in hits
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


def _text(value: Any) -> str:
    return "" if value is None or value != value else str(value)  # NaN is not itself


def _fill(template: str, **values: str) -> str:
    """Fills `{text}` in; other braces stay (a JSON example in a template is no mistake)."""
    return re.sub(r"\{(text_pair|text)\}", lambda match: values.get(match.group(1), ""), template)


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(shifted / shifted.sum(-1, keepdims=True))
