"""BLEU, chrF and TER by sacrebleu, from statistics of rows, so that rows can be drawn anew."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from . import Stats
from ._texts import NO_SPACES


def stats(texts: Sequence[str], golds: Sequence[Sequence[str]], script: str) -> Stats:
    """What sacrebleu keeps of each row: "bleu" [rows, 10], "chrf" [rows, 18] and "ter" [rows, 2].

    Args:
        texts: one a row.
        golds: for each row its references, at least one; not all rows need have as many.
        script: as `_texts.script_of` has it.
    """
    most = max(map(len, golds))
    streams = [[gold[at] if at < len(gold) else None for gold in golds] for at in range(most)]
    return {
        name: np.array(measure._extract_corpus_statistics(list(texts), streams))
        for name, measure in _measures(script).items()
    }


def scores(found: Stats, script: str) -> dict[str, float]:
    """The scores of these rows together, 0 to 100; the lower the better of TER alone. As `corpus_score` gives them."""
    return {
        name: float(measure._compute_score_from_stats(found[name].sum(0).tolist()).score)
        for name, measure in _measures(script).items()
    }


def sentences(found: Stats, script: str) -> np.ndarray:
    """chrF of each row by itself."""
    measure = _measures(script)["chrf"]
    return np.array([measure._compute_score_from_stats(row.tolist()).score for row in found["chrf"]])


def signatures(script: str) -> dict[str, str]:
    """How each is computed, in sacrebleu's words."""
    return {name: str(measure.get_signature().format()) for name, measure in _measures(script).items()}


@cache
def _measures(script: str) -> dict[str, Any]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    words = {"zh": "zh", "ja": "ja-mecab" if importlib.util.find_spec("MeCab") else "char"}.get(script, "13a")
    made = {"bleu": BLEU(tokenize=words, force=True), "chrf": CHRF(), "ter": TER(asian_support=script in NO_SPACES)}
    for measure in made.values():
        measure.num_refs = 1  # until there are texts
    return made
