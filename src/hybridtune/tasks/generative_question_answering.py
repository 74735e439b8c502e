"""Generative question answering: the answer is written, about a context or from what the model knows."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from datasets import Dataset

from ..data.checking import check
from . import Baseline, Stats, _squad
from ._generation import WritingTask
from .metrics import Interval

if TYPE_CHECKING:
    from ..data.checking.findings import Finding
    from ..recipe import Recipe

CONTEXT = "{context}"


class Task(WritingTask):
    """Questions that are answered in the model's own words; where there is no answer, with no word.

    Args:
        with_context: whether the answer is looked for in a context: as the template says; without one, whether the
            rows have any.
        **more: of every task whose models write.
    """

    name = "generative_question_answering"
    most_new_tokens = 30  # as max_answer_length of transformers' example
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "question": ("query", "question_text"),
        "context": ("passage", "paragraph", "document", "article"),
        "answers": ("answer", "answer_text"),
    }
    inputs: tuple[str, ...] = ("question", "context")
    target: ClassVar[str] = "answers"
    answer = "answer"

    def __init__(self, *, with_context: bool = True, **more: Any) -> None:
        super().__init__(**more)
        self._take_context(with_context)
        self.metrics = {"f1": "maximize", "exact_match": "maximize"}

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """Reads the template and how to write."""
        return cls(**cls.arguments(recipe), with_context=recipe.template is None or CONTEXT in recipe.template)

    def state(self) -> dict[str, Any]:
        """Whether there is a context, too."""
        return {**super().state(), "with_context": self.with_context}

    def _take_context(self, with_context: bool) -> None:
        self.with_context = with_context
        self.inputs = ("question", "context") if with_context else ("question",)
        self.required = (*self.inputs, self.target)

    def look_at(self, columns: Sequence[str]) -> None:
        """Rows without a context are questions about what the model knows, unless the template wants one."""
        if self.template is None:
            self._take_context(self.has("context", columns))

    def untold(self, chat: bool) -> str:
        """As T5 was told questions about a context (Raffel et al. 2020), or what a decoder can go on with."""
        if self.encoder_decoder:
            return "question: {question} context: {context}" if self.with_context else "{question}"
        before = f"{CONTEXT}\n\n" if self.with_context else ""
        return f"{before}{{question}}" if chat else f"{before}Question: {{question}}\nAnswer: "

    def check(
        self, splits: dict[str, Dataset], sources: dict[str, str]
    ) -> tuple[dict[str, Dataset], list[check.Finding]]:
        """Checks questions and answers."""
        return check.check_question_answering(splits, sources=sources, texts=self.inputs, extracted=False)

    def recheck(self, rows: Dataset, source: str) -> tuple[Dataset, list[Finding]]:
        """As test rows are when tuning."""
        splits, findings = check.check_question_answering(
            {"test": rows}, sources={"test": source}, texts=self.inputs, extracted=False, no_answer=True
        )
        return splits["test"], findings

    def lacking(self, rows: Dataset) -> np.ndarray:
        """None: a question may be one that has no answer."""
        return np.zeros(len(rows), bool)

    def golds(self, rows: Dataset) -> list[list[str]]:
        """The right answers; where there is none, no word is right."""
        return [golds or [""] for golds in _squad.golds_of(rows)]

    def scores(self, texts: Sequence[str], golds: Sequence[Sequence[str]]) -> Stats:
        """Exact match and F1 of each row, 0 to 1, as SQuAD's."""
        return _squad.stats(texts, golds)

    def aggregate(self, stats: Stats) -> dict[str, float]:
        """F1 and exact match, 0 to 100, as the official script of SQuAD."""
        return _squad.aggregate(stats)

    def intervals(self, stats: Stats) -> dict[str, Interval]:
        """BCa bootstrap for F1, Wilson for exact match."""
        return _squad.intervals(stats)

    def each(self, stats: Stats) -> np.ndarray:
        """F1."""
        return np.asarray(stats["f1"])

    def right(self, stats: Stats) -> np.ndarray:
        """Whether the answer is one of the right ones, but for case, punctuation and articles."""
        return np.asarray(stats["exact_match"] == 1)

    @property
    def signatures(self) -> dict[str, str]:
        """How F1 and exact match are computed."""
        return {"f1, exact_match": "SQuAD 2.0's normalization and scores; Chinese and Japanese by character"}

    def say(self, prediction: dict[str, Any]) -> str:
        """The answer."""
        return prediction[self.answer] or "no answer"

    @property
    def apart(self) -> tuple[str, ...]:
        """Questions on one context stay together."""
        return self.inputs[-1:]

    def strata(self, rows: Dataset) -> Sequence[Sequence[Hashable]]:  # type: ignore[override]
        """Whether there is an answer."""
        return [(bool(golds),) for golds in _squad.golds_of(rows)]

    def profile(self, splits: dict[str, Dataset]) -> dict[str, Any]:
        """How many questions and answers there are, and how long all texts are."""
        return {**super().profile(splits), "answers": [_squad.profile(name, rows) for name, rows in splits.items()]}

    def baselines(
        self, train: Dataset, test: Dataset, features: tuple[np.ndarray, np.ndarray] | None
    ) -> list[Baseline]:
        """The likest sentence of the context; the answer to the likest question; where there may be no answer, none."""
        golds = self.golds(test)
        made = [_squad.likest_sentence(train, test)] if self.with_context else []
        made.append(_squad.likest_question(train, test))
        if any(gold == [""] for gold in golds):
            made.append(("no answer", "to every question", [""] * len(golds)))
        return [Baseline(name, how, self.stats(texts, test), texts) for name, how, texts in made]
