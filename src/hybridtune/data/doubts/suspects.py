"""Labels that are likely wrong, found by confident learning on frozen features.

A linear model says what it thinks of every row, out of fold: it has not seen the row. Confident learning (Northcutt,
Jiang and Chuang 2021, "Confident learning: estimating uncertainty in dataset labels", by cleanlab) estimates from that
how many labels are wrong, with care: rather too few than too many. Those are taken to which the model gives the least
probability, a better order than by margins. `benchmarks/suspects.py` plants faults and counts how many are found.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .linear import classifier, quietly, regressor

Array = NDArray[Any]

FOLDS = 5
STRENGTH = 0.01  # of 1 to 0.003 this ranks planted faults best, on banking77 and snips (benchmarks/suspects.py)
FAR = (
    3.5  # a modified z-score beyond that is an outlier (Iglewicz and Hoaglin 1993, "How to detect and handle outliers")
)


class Suspect(NamedTuple):
    """A row whose label is likely wrong.

    Attributes:
        row: its position.
        given: its label; the numbers of its labels where it may have several.
        suggested: what the model says instead.
        score: the probability that the model gives to the label; of a number, that of a residual as large as its own.
    """

    row: int
    given: Any
    suggested: Any
    score: float


def suspect_labels(features: Array, labels: ArrayLike, *, seed: int = 0) -> list[Suspect]:
    """Finds rows whose one label is likely wrong.

    Args:
        features: frozen ones, float [rows, width].
        labels: of the rows, numbers or texts, [rows].
        seed: of the folds.

    Returns:
        The suspects, the most likely wrong first. Rows of a class with fewer rows than there are folds (5) are not
        judged, and such a class is never suggested: its model would have seen next to nothing of it.
    """
    names, ids = np.unique(np.asarray(labels), return_inverse=True)
    judged = np.flatnonzero(np.bincount(ids)[ids] >= FOLDS) if len(ids) else ids
    names, ids = np.unique(names[ids[judged]], return_inverse=True)
    if len(names) < 2:
        return []
    probabilities = _out_of_fold(np.asarray(features)[judged], ids, seed)
    found = _issues(ids, probabilities)
    given, best = names[ids], names[probabilities.argmax(1)]
    return [
        Suspect(int(judged[at]), given[at].item(), best[at].item(), float(probabilities[at, ids[at]])) for at in found
    ]


def suspect_label_sets(features: Array, labels: ArrayLike, *, seed: int = 0) -> list[Suspect]:
    """Finds rows that likely have a label too many or too few, each label judged by itself.

    Args:
        features: frozen ones, float [rows, width].
        labels: 1 where a row has a label and 0 where not, [rows, labels].
        seed: of the folds.

    Returns:
        The suspects, the most likely wrong first; `given` and `suggested` are tuples of label numbers, `score` is that
        of the most doubtful label. Labels that fewer rows than 5 have, or lack, are not judged.
    """
    features, target = np.asarray(features), np.asarray(labels).astype(int)
    own, doubtful = np.ones(target.shape), np.zeros(target.shape, dtype=bool)
    for number, column in enumerate(target.T):
        if FOLDS <= column.sum() <= len(column) - FOLDS:
            probabilities = _out_of_fold(features, column, seed)
            found = _issues(column, probabilities)
            doubtful[found, number] = True
            own[found, number] = probabilities[found, column[found]]
    rows = np.flatnonzero(doubtful.any(1))
    suggested = target ^ doubtful
    return [
        Suspect(
            int(row),
            tuple(np.flatnonzero(target[row]).tolist()),
            tuple(np.flatnonzero(suggested[row]).tolist()),
            float(own[row].min()),
        )
        for row in rows[np.argsort(own[rows].min(1), kind="stable")]
    ]


def suspect_values(features: Array, values: ArrayLike, *, seed: int = 0) -> list[Suspect]:
    """Finds rows whose number lies far from what the other rows let expect.

    Those are rows whose residual, of a ridge regression, out of fold, lies more than 3.5 standard deviations from the
    median residual; the standard deviation is estimated from the median of these distances.

    Args:
        features: frozen ones, float [rows, width].
        values: of the rows, [rows].
        seed: of the folds.

    Returns:
        The suspects, the farthest first; none where there are fewer than 10 rows.
    """
    from scipy.special import ndtr
    from sklearn.model_selection import KFold, cross_val_predict

    target = np.asarray(values, dtype=float)
    if len(target) < 2 * FOLDS:
        return []
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    predicted = cross_val_predict(regressor(), np.asarray(features, dtype=float), target, cv=folds)
    residuals = target - predicted
    away = np.abs(residuals - np.median(residuals))
    far = 0.6745 * away / max(float(np.median(away)), 1e-12 * float(np.ptp(target)), np.finfo(float).tiny)
    found = np.flatnonzero(far > FAR)
    return [
        Suspect(int(at), float(target[at]), float(predicted[at]), float(2 * ndtr(-far[at])))
        for at in found[np.argsort(-far[found], kind="stable")]
    ]


def _out_of_fold(features: Array, ids: Array, seed: int) -> Array:
    """The probability of every class for every row, from a model that has not seen the row, [rows, classes]."""
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    with quietly():
        found = cross_val_predict(
            classifier(STRENGTH), features.astype(np.float32), ids, cv=folds, method="predict_proba"
        )
    return np.asarray(found, dtype=float)


def _issues(ids: Array, probabilities: Array) -> Array:
    """Rows that are likely wrong, the worst first: as many as confident learning counts, of the least probability."""
    from cleanlab.filter import find_label_issues

    found = find_label_issues(
        ids,
        probabilities,
        filter_by="low_self_confidence",
        return_indices_ranked_by="self_confidence",
        n_jobs=1,
    )
    return np.asarray(found, dtype=int)
