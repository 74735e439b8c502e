"""Exact match and F1 of answers, as the official script of SQuAD computes them, and by character where words have no
spaces between them."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)
_PUNCTUATION = set(string.punctuation)
# Han, kana, bopomofo and the marks that stand among them: scripts without spaces between words.
_NO_SPACES = re.compile("[\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3041-\u30ff\u3100-\u312f\u31a0-\u31ff"
                        "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff]")  # fmt: skip


def normalize(answer: str) -> str:
    """Lower case, without punctuation, articles and superfluous spaces (Rajpurkar et al. 2016).

    Where a text has Chinese or Japanese characters, their punctuation goes too, and spaces beside them.
    """
    plain = "".join(character for character in answer.lower() if character not in _PUNCTUATION)
    words = " ".join(_ARTICLES.sub(" ", plain).split())
    if not _NO_SPACES.search(words):
        return words
    kept = "".join(character for character in words if not unicodedata.category(character).startswith("P"))
    return " ".join(_NO_SPACES.sub(r" \g<0> ", kept).split())


def score(answer: str, golds: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of an answer, 0 to 1, each with the gold answer that it fits best; no golds mean no answer."""
    kept = [gold for gold in golds if normalize(gold)] or [""]
    return max(_exact(answer, gold) for gold in kept), max(_f1(answer, gold) for gold in kept)


def _exact(answer: str, gold: str) -> float:
    return float(normalize(answer) == normalize(gold))


def _f1(answer: str, gold: str) -> float:
    predicted, wanted = normalize(answer).split(), normalize(gold).split()
    if not predicted or not wanted:  # no answer is right only where there is none
        return float(predicted == wanted)
    same = sum((Counter(predicted) & Counter(wanted)).values())
    if not same:
        return 0.0
    precision, recall = same / len(predicted), same / len(wanted)
    return 2 * precision * recall / (precision + recall)
