"""Summarization: a document in few words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from datasets import Dataset

from ..data.checking import check
from . import Stats, _rouge
from ._generation import WritingTask
from ._texts import NO_SPACES, sentences

if TYPE_CHECKING:
    from ..recipe import Recipe


class Task(WritingTask):
    """Summarization, of `document` into `summary`. Arguments are those of every task whose models write."""

    name = "summarization"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "document": ("article", "text", "dialogue", "content", "body", "source"),
        "summary": ("highlights", "abstract", "headline", "title", "target"),
        "references": (),
    }
    required: tuple[str, ...] = ("document", "summary")
    inputs: tuple[str, ...] = ("document",)
    target: ClassVar[str] = "summary"

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        # ROUGE-L first: of the three, it alone cannot be raised by the right words in any order.
        self.metrics = dict.fromkeys(("rougeL", "rouge1", "rouge2"), "maximize")

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """Reads the template and how to write."""
        return cls(**cls.arguments(recipe))

    def check(
        self, splits: dict[str, Dataset], sources: dict[str, str]
    ) -> tuple[dict[str, Dataset], list[check.Finding]]:
        """Checks documents and summaries; learns whether words have spaces between them."""
        splits, findings = check.check_summarization(splits, sources=sources)
        return splits, [*findings, *self.learn_script(splits["train"])]

    def scores(self, texts: Sequence[str], golds: Sequence[Sequence[str]]) -> Stats:
        """ROUGE of each row, 0 to 1, with the reference that it is most like."""
        return _rouge.stats(texts, golds, self.script)

    def aggregate(self, stats: Stats) -> dict[str, float]:
        """The means over the rows, 0 to 100."""
        return {name: 100 * float(stats[name].mean()) for name in self.metrics}

    def each(self, stats: Stats) -> np.ndarray:
        """ROUGE-L."""
        return np.asarray(stats["rougeL"])

    @property
    def signatures(self) -> dict[str, str]:
        """How ROUGE is computed."""
        return {"rouge": _rouge.signature(self.script)}

    def baselines(
        self, train: Dataset, test: Dataset, features: tuple[np.ndarray, np.ndarray] | None
    ) -> list[tuple[str, str, Stats]]:
        """The first sentence of the document, and the first three."""
        documents = ["" if text is None else str(text) for text in test["document"][:]]
        space = "" if self.script in NO_SPACES else " "

        def lead(count: int) -> Stats:
            return self.stats([space.join(sentences(text)[:count]) for text in documents], test)

        return [
            ("lead-1", "the first sentence of the document", lead(1)),
            ("lead-3", "its first three sentences", lead(3)),
        ]
