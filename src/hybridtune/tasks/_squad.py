"""What tasks share that answer questions: exact match and F1, as the official script of SQuAD computes them, and by
character where words have no spaces between them; counts; what every model has to beat."""

from __future__ import annotations

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.checking.answers import answers_of
from ..data.checking.rows import texts_of
from . import Stats, baselines, metrics
from ._texts import sentences
from .metrics import Interval

if TYPE_CHECKING:
    from datasets import Dataset

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


def golds_of(rows: Dataset) -> list[list[str]]:
    """The right answers of each row, none where there is no answer."""
    return [[text for text, _ in answers_of(value)] for value in rows["answers"][:]]


def stats(answers: Sequence[str], golds: Sequence[Sequence[str]]) -> Stats:
    """Exact match and F1 of each row, 0 to 1, and whether it has an answer."""
    scores = np.array([score(answer, gold) for answer, gold in zip(answers, golds, strict=True)]).reshape(-1, 2)
    return {"exact_match": scores[:, 0], "f1": scores[:, 1], "answerable": np.array([bool(gold) for gold in golds])}


def aggregate(stats: Stats) -> dict[str, float]:
    """F1 and exact match of rows, 0 to 100."""
    return {key: 100 * float(stats[key].mean()) for key in ("f1", "exact_match")}


def intervals(stats: Stats) -> dict[str, Interval]:
    """BCa bootstrap for F1, Wilson for exact match."""
    exact = metrics.wilson(int(stats["exact_match"].sum()), len(stats["exact_match"])).times(100)
    return {**metrics.intervals(stats, aggregate), "exact_match": exact}


def profile(split: str, rows: Dataset) -> dict[str, Any]:
    """How many questions, contexts and answers a split has."""
    golds = golds_of(rows)
    found: dict[str, Any] = {"split": split, "rows": len(rows)}
    if "context" in rows.column_names:
        found["contexts"] = len(set(texts_of(rows, "context")))
    lengths = [len(texts[0]) for texts in golds if texts] or [0]
    return {**found, "no_answer": sum(not texts for texts in golds), "answer_characters": float(np.median(lengths))}


def likest_sentence(train: Dataset, test: Dataset) -> tuple[str, str, list[str]]:
    """The sentence of the context that is most like the question, as a baseline."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(token_pattern=r"(?u)\w+", sublinear_tf=True).fit(
        list(dict.fromkeys(texts_of(train, "context")))
    )
    answers = []
    for question, context in zip(texts_of(test, "question"), texts_of(test, "context"), strict=True):
        found = sentences(context) or [""]
        alike = (words.transform(found) @ words.transform([question]).T).toarray().ravel()
        answers.append(found[int(alike.argmax())])
    detail = "the sentence of the context whose words (tf-idf) are most like the question's"
    return "likest sentence", detail, answers


def likest_question(train: Dataset, test: Dataset) -> tuple[str, str, list[str]]:
    """The answer to the question of train that is most like this one, as a baseline."""
    answers = [next(iter(golds), "") for golds in golds_of(train)]
    chosen = baselines.likest(texts_of(train, "question"), texts_of(test, "question"))
    detail = "the answer to the question of train whose words (tf-idf) are most like this one's"
    return "likest question", detail, [answers[at] for at in chosen]
