"""ROUGE-1, ROUGE-2 and ROUGE-L by rouge-score: F1 of each row."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np

from . import Stats
from ._texts import word_places

NAMES = ("rouge1", "rouge2", "rougeL")


def stats(texts: Sequence[str], golds: Sequence[Sequence[str]], script: str) -> Stats:
    """F1 of each row, 0 to 1, each with the reference that it is highest with.

    Args:
        texts: one a row.
        golds: for each row its references, at least one.
        script: as `_texts.script_of` has it; where it is not "latin" words are ours: rouge-score's are of a-z alone.
    """
    scorer = _scorer(script)
    found = [scorer.score_multi(list(gold), text) for text, gold in zip(texts, golds, strict=True)]
    return {name: np.array([one[name].fmeasure for one in found]) for name in NAMES}


def signature(script: str) -> str:
    """How it is computed, in words."""
    words = {"latin": "Porter's stems of words of a-z and 0-9", "other": "words"}.get(script, "characters")
    return f"F1 of {words}, the best of the references, rouge-score {version('rouge-score')}"


@cache
def _scorer(script: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(NAMES), use_stemmer=True, tokenizer=None if script == "latin" else _Words())


class _Words:
    """Words of all scripts, in lower case; a character each where there are no spaces between them."""

    def tokenize(self, text: str) -> list[str]:
        words = (text[slice(*place)].lower() for place in word_places(text))
        return [word for word in words if any(map(str.isalnum, word))]
