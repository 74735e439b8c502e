"""Translation: a text in another language."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from datasets import Dataset

from ..data.bars import no_bars
from ..data.checking import check
from . import Baseline, Stats, _bleu
from ._generation import WritingTask
from ._languages import set_languages, untold

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data.checking.findings import Finding
    from ..recipe import Recipe

NESTED = "translation"


class Task(WritingTask):
    """Translation, of `source` into `target`; or of `translation` rows, {"en": ..., "de": ...}.

    Args:
        source_language, target_language: codes of the model's, where it has some; they also name the columns.
        **more: of every task whose models write.
    """

    name = "translation"
    keys = (*WritingTask.keys, "source_language", "target_language")
    columns: ClassVar[dict[str, tuple[str, ...]]] = {
        "source": ("src", "source_text", "input", "sentence"),
        "target": ("tgt", "target_text", "translation", "output"),
        "references": (),
    }
    required: tuple[str, ...] = ("source", "target")
    inputs: tuple[str, ...] = ("source",)
    target: ClassVar[str] = "target"

    def __init__(self, *, source_language: str | None = None, target_language: str | None = None, **more: Any) -> None:
        super().__init__(**more)
        self.source_language, self.target_language = source_language, target_language
        named = {"source": _names(source_language), "target": _names(target_language)}
        self.columns = {key: (*named.get(key, ()), *names) for key, names in type(self).columns.items()}  # type: ignore[misc]
        self.metrics = {"bleu": "maximize", "chrf": "maximize", "ter": "minimize"}

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> Self:
        """Reads the languages, the template and how to write."""
        languages = {key: getattr(recipe, key) for key in ("source_language", "target_language")}
        return cls(**cls.arguments(recipe), **languages)

    def state(self) -> dict[str, Any]:
        """The languages too."""
        return {
            **super().state(),
            "source_language": self.source_language,
            "target_language": self.target_language,
        }

    def unpack(self, table: Dataset) -> Dataset:
        """Languages of nested rows as columns."""
        if NESTED not in table.column_names or not isinstance(table.features[NESTED], dict):
            return table
        there = [key for key in table.features[NESTED] if key not in table.column_names]
        nested = table[NESTED][:]
        with no_bars():
            for key in there:
                table = table.add_column(key, [(row or {}).get(key) for row in nested])
        return table.remove_columns(NESTED)

    def check(
        self, splits: dict[str, Dataset], sources: dict[str, str]
    ) -> tuple[dict[str, Dataset], list[check.Finding]]:
        """Checks the pairs; learns whether words of the target have spaces between them."""
        languages = (self.source_language, self.target_language)
        splits, findings = check.check_translation(splits, sources=sources, languages=languages)
        return splits, [*findings, *self.learn_script(splits["train"], self.target_language)]

    def recheck(self, rows: Dataset, source: str) -> tuple[Dataset, list[Finding]]:
        """As test rows are when tuning."""
        splits, sources = {"test": rows}, {"test": source}
        languages = (self.source_language, self.target_language)
        splits, findings = check.check_translation(splits, sources=sources, languages=languages, known=True)
        return splits["test"], findings

    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tells model and tokenizer the languages, where they have codes of them."""
        super().prepare(model, tokenizer)
        set_languages(model, tokenizer, self.source_language, self.target_language)

    def remarks(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
        """That a model is not told the languages, too."""
        given = {"source_language": self.source_language, "target_language": self.target_language}
        return [*super().remarks(model, tokenizer), *untold(tokenizer, given)]

    def called(self, names: Iterable[str]) -> list[str]:
        """Such as translation_en_to_de; between these languages first."""
        source, target = (_names(code)[-1:] for code in (self.source_language, self.target_language))
        own = "_".join((self.name, *source, "to", *target))
        return sorted((name for name in names if name.startswith(f"{self.name}_")), key=lambda name: name != own)

    def scores(self, texts: Sequence[str], golds: Sequence[Sequence[str]]) -> Stats:
        """What sacrebleu keeps of each row."""
        return _bleu.stats(texts, golds, self.script)

    def aggregate(self, stats: Stats) -> dict[str, float]:
        """BLEU, chrF and TER of these rows together, 0 to 100, as sacrebleu's."""
        return _bleu.scores(stats, self.script)

    def each(self, stats: Stats) -> np.ndarray:
        """chrF of each row: BLEU is none of single sentences."""
        return _bleu.sentences(stats, self.script)

    @property
    def signatures(self) -> dict[str, str]:
        """sacrebleu's."""
        return _bleu.signatures(self.script)

    def baselines(
        self, train: Dataset, test: Dataset, features: tuple[np.ndarray, np.ndarray] | None
    ) -> list[Baseline]:
        """The source, untranslated."""
        texts = ["" if text is None else str(text) for text in test["source"][:]]
        return [Baseline("copy", "the source as it is", self.stats(texts, test), texts)]


def _names(language: str | None) -> tuple[str, ...]:
    """What the column of a language may be called: its code, and what stands in front in codes such as de_DE."""
    return tuple(dict.fromkeys((language, re.split("[_-]", language)[0]))) if language else ()
