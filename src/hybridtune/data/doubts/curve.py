"""Enough data? A learning curve on frozen features, and what twice the data would likely bring.

A linear model is trained on parts of train and scored on held-out rows. Through the errors at n rows goes a power law,
a + b n^-c (Cortes et al. 1994, "Learning curves: asymptotic values and rate of convergence"; Hestness et al. 2017,
"Deep learning scaling is predictable, empirically"), which is followed to twice the rows. The bootstrap says how sure
that is.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .linear import classifier, quietly, regressor

Array: TypeAlias = NDArray[Any]
Kind: TypeAlias = Literal["classes", "labels", "values"]

PARTS = (8, 4, 2, 1)  # train is cut into so many parts, and each is trained on
STRENGTH = 0.1
DRAWS = 500
ENDS = (2.5, 97.5)
# Below 0.1 an error would hardly fall, above 1 it would fall faster than that of a model of few parameters.
EXPONENTS = np.linspace(0.1, 1.0, 181)
FEW_ROWS = 10  # in a part, or held out
OF_A_CLASS = 3  # below so many rows of a class, on average, scores rise along another curve (seen on banking77)
SIZES = 3  # fewer cannot be told from each other by a curve with three parameters
WIDE = 0.05  # an interval that is wider than 5 points, and in which no gain lies too, is nothing to act on


@dataclass(frozen=True)
class Point:
    """A score after training on `rows` rows: the mean of the parts of that size, and the least and best of them."""

    rows: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Curve:
    """What was measured and what follows from it. Scores are 0 to 1, R² may be less than 0.

    Attributes:
        metric: "macro_f1" or "r2".
        points: by rising number of rows; the last is all of train.
        twice: the score after training on twice the rows, and its 95% interval: (value, low, high).
        gain: what that is more than now, in the same form. Both are None where there is too little data to try.
        verdict: the same in one sentence.
    """

    metric: str
    points: tuple[Point, ...]
    twice: tuple[float, float, float] | None
    gain: tuple[float, float, float] | None
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """Returns it as plain JSON."""
        return asdict(self)


def learning_curve(
    train: tuple[Array, ArrayLike], held_out: tuple[Array, ArrayLike], kind: Kind = "classes", *, seed: int = 0
) -> Curve:
    """Measures how the score rises with the rows of train, and what twice as many would bring.

    Train is cut, in random order, into 8, 4 and 2 parts and taken whole: parts of one size have no row in common, so
    that their scores vary as those of other data would, and every size costs about the same time. Parts that are too
    small for the number of classes are left out.

    Args:
        train: features, float [rows, width], and targets.
        held_out: the same of rows that are only scored.
        kind: what the targets are: "classes" [rows], "labels" of which a row may have several, 0 and 1 [rows, labels],
            or "values" [rows]. The score is macro-F1, or R² for values.
        seed: of the order and the bootstrap.

    Returns:
        The curve. Its intervals hold for a linear model on frozen features, of rows like these.
    """
    (x, y), (held_x, held_y), metric = train, held_out, "r2" if kind == "values" else "macro_f1"
    x, held_x = (np.asarray(features, dtype=np.float32) for features in (x, held_x))
    target, gold = _targets(np.asarray(y), np.asarray(held_y), kind)
    classes = len(np.unique(target)) if kind == "classes" else 2
    parts = [count for count in PARTS if len(x) / count >= max(FEW_ROWS, OF_A_CLASS * classes)]
    if len(parts) < SIZES or len(held_x) < FEW_ROWS or classes < 2:
        found = f"{len(x)} rows, {len(held_x)} held out" + (f", {classes} classes" if kind == "classes" else "")
        return Curve(metric, (), None, None, f"cannot tell: too little data ({found})")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(x))
    with quietly():
        predicted = [
            np.stack([_predict(x[part], target[part], held_x, kind) for part in np.array_split(order, count)])
            for count in parts
        ]
    rows, every = np.array([len(x) / count for count in parts]), np.arange(len(gold))
    scores = [_scores(gold, of_size, every, kind) for of_size in predicted]
    points = tuple(
        Point(round(n), float(found.mean()), float(found.min()), float(found.max()))
        for n, found in zip(rows, scores, strict=True)
    )
    return _followed(metric, points, *_bootstrap(rows, scores, predicted, gold, kind, rng))


def _targets(target: Array, gold: Array, kind: Kind) -> tuple[Array, Array]:
    """Values as floats, labels as 0 and 1, classes as numbers; what is held out may have other classes."""
    if kind != "classes":
        as_type = float if kind == "values" else int
        return target.astype(as_type), gold.astype(as_type)
    _, ids = np.unique(np.concatenate([target, gold]), return_inverse=True)
    return ids[: len(target)], ids[len(target) :]


def _predict(x: Array, target: Array, held_x: Array, kind: Kind) -> Array:
    """What a model of these rows says of the held-out ones."""
    if kind == "values":
        return np.asarray(regressor().fit(x, target).predict(held_x))
    if kind == "labels":
        return np.stack([_predict(x, label, held_x, "classes") for label in target.T], axis=1)
    if (target == target[0]).all():
        return np.full(len(held_x), target[0])
    return np.asarray(classifier(STRENGTH).fit(x, target).predict(held_x))


def _scores(gold: Array, predicted: Array, rows: Array, kind: Kind) -> Array:
    """The score of each model on some of the rows; `predicted` is [models, rows, ...]."""
    return np.array([_score(gold[rows], one[rows], kind) for one in predicted])


def _score(gold: Array, predicted: Array, kind: Kind) -> float:
    """R², or macro-F1 over the classes that occur (over all labels): scikit-learn's, but not its seconds of checks."""
    if kind == "values":
        return float(1 - ((gold - predicted) ** 2).sum() / max(((gold - gold.mean()) ** 2).sum(), 1e-12))
    if kind == "labels":
        hits, all_of = (gold & predicted).sum(0), gold.sum(0) + predicted.sum(0)
        return float((2 * hits / np.maximum(all_of, 1)).mean())
    most = int(max(gold.max(), predicted.max())) + 1
    hits = np.bincount(gold[gold == predicted], minlength=most)
    all_of = np.bincount(gold, minlength=most) + np.bincount(predicted, minlength=most)
    return float((2 * hits / np.maximum(all_of, 1))[all_of > 0].mean())


def _bootstrap(
    rows: Array, scores: list[Array], predicted: list[Array], gold: Array, kind: Kind, rng: np.random.Generator
) -> tuple[Array, Array]:
    """Scores at twice the rows, and how much more that is than now, of the data [0] and of resamples of it [1:].

    A resample draws held-out rows, the same for all models, and adds to the mean score of each size what other train
    rows would have changed. The variance of a score from train set to train set is taken to fall as 1 / rows; then that
    of the mean over n / m parts of m rows is the same for every m, and all sizes together estimate it.
    """
    free = [(len(found) - 1, found.var() * len(found) * n) for n, found in zip(rows, scores, strict=True)]
    spread = (sum(part for _, part in free) / sum(count for count, _ in free) / rows[-1]) ** 0.5
    means = [np.array([found.mean() for found in scores])]
    for _ in range(DRAWS):
        drawn = rng.integers(0, len(gold), len(gold))
        means.append(np.array([_scores(gold, of_size, drawn, kind).mean() for of_size in predicted]))
    seen = np.stack(means)
    noise = rng.normal(size=seen.shape) * spread
    later = rng.normal(size=len(seen)) * spread / 2**0.5
    noise[0], later[0] = 0, 0
    twice = 1 - _follow(rows, 1 - seen - noise, 2 * rows[-1]) + later
    return twice, twice - seen[:, -1]


def _follow(rows: Array, errors: Array, where: float) -> Array:
    """The errors at `where` rows by the power laws a + b n^-c that fit best, of each line of `errors` [lines, sizes].

    For a given c it is a linear problem with a, b >= 0 (separable least squares, Golub and Pereyra 1973), and c is one
    of a few: no start, no step, no local minimum.
    """
    best, found = np.full(len(errors), np.inf), np.empty(len(errors))
    for exponent in EXPONENTS:
        x = (rows / rows[-1]) ** -exponent
        away = x - x.mean()
        b = np.maximum(errors @ away / (away @ away), 0)
        a = errors.mean(1) - b * x.mean()
        b = np.where(a < 0, errors @ x / (x @ x), b)
        a = np.maximum(a, 0)
        loss = ((errors - a[:, None] - b[:, None] * x) ** 2).sum(1)
        better = loss < best
        best = np.where(better, loss, best)
        found = np.where(better, a + b * (where / rows[-1]) ** -exponent, found)
    return found


def _followed(metric: str, points: tuple[Point, ...], twice: Array, gain: Array) -> Curve:
    """The curve, with the percentile intervals of the resamples and what they mean in words."""
    (low, high), (less, more) = np.percentile(twice[1:], ENDS), np.percentile(gain[1:], ENDS)
    value, likely = float(twice[0]), float(gain[0])
    interval = (value, min(float(low), value), min(max(float(high), value), 1.0))
    gained = (likely, min(float(less), likely), max(float(more), likely))
    told = f"{100 * likely:.1f} points of {metric} [{100 * gained[1]:.1f}, {100 * gained[2]:.1f}]"
    if gained[2] - gained[1] > WIDE and gained[1] <= 0:
        return Curve(metric, points, interval, gained, f"cannot tell what twice the data would add: {told} is too wide")
    return Curve(metric, points, interval, gained, f"twice the data would likely add {told}")
