"""Summarization: a document in few words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from datasets import Dataset

from ..data.checking import check
from . import Baseline, Stats, _rouge
from ._generation import WritingTask
from ._languages import set_languages, untold
from ._texts import NO_SPACES, sentences

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.checking.findings import Finding
    from ..recipe import Recipe


class Task(WritingTask):
    """Summarization, of `document` into `summary`.

    Args:
        target_language: of both, as a code of the model's, where it has some.
        **more: of every task whose models write.
    """

    name = "summarization"
    keys = (*WritingTask.keys, "target_language")
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "document": ("article", "text", "dialogue", "content", "body", "source"),
        "summary": ("highlights", "abstract", "headline", "title", "target"),
        "references": (),
    }
    required: tuple[str, ...] = ("document", "summary")
    inputs: tuple[str, ...] = ("document",)
    target: ClassVar[str] = "summary"

    def __init__(self, *, target_language: str | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.target_language = target_language
        # ROUGE-L first: of the three, it alone cannot be raised by the right words in any order.
        self.metrics = dict.fromkeys(("rougeL", "rouge1", "rouge2"), "maximize")

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """Reads the language, the template and how to write."""
        return cls(**cls.arguments(recipe), target_language=recipe.target_language)

    def state(self) -> dict[str, Any]:
        """The language too."""
        return {**super().state(), "target_language": self.target_language}

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tells model and tokenizer the language, where they have codes of languages."""
        super().prepare(model, tokenizer)
        set_languages(model, tokenizer, self.target_language, self.target_language)

    def remarks(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
        """That a model is not told the language, too."""
        return [*super().remarks(model, tokenizer), *untold(tokenizer, {"target_language": self.target_language})]

    def check(
        self, splits: dict[str, Dataset], sources: dict[str, str]
    ) -> tuple[dict[str, Dataset], list[check.Finding]]:
        """Checks documents and summaries; learns whether words have spaces between them."""
        splits, findings = check.check_summarization(splits, sources=sources)
        return splits, [*findings, *self.learn_script(splits["train"], self.target_language)]

    def recheck(self, rows: Dataset, source: str) -> tuple[Dataset, list[Finding]]:
        """As test rows are when tuning."""
        splits, findings = check.check_summarization({"test": rows}, sources={"test": source}, known=True)
        return splits["test"], findings

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
    ) -> list[Baseline]:
        """The first sentence of the document, and the first three."""
        documents = ["" if text is None else str(text) for text in test["document"][:]]
        space = "" if self.script in NO_SPACES else " "

        def lead(count: int, detail: str) -> Baseline:
            texts = [space.join(sentences(text)[:count]) for text in documents]
            return Baseline(f"lead-{count}", detail, self.stats(texts, test), texts)

        return [lead(1, "the first sentence of the document"), lead(3, "its first three sentences")]
