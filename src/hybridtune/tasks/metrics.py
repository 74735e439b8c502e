"""Scores of classifiers, confidence intervals for any score, and tests between two models on the same rows.

Everything starts from *row statistics*: a dict of arrays whose first dimension is the number of rows n. A statistic is
any function of such a dict, so that every metric, macro-F1 and corpus BLEU too, gets its interval by resampling rows.
An interval that may not hold on so little data says so in its `warning`.

Class ids are 0, 1, ..., k - 1. Scores are 0-1 (Matthews' correlation -1 to 1) and equal to scikit-learn's. No rows at
all raise DataError; arrays that do not belong together raise ValueError.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from hybridtune.errors import DataError

Array = NDArray[Any]
Stats = dict[str, Array]
Statistic = Callable[[Stats], float]

FEW_ROWS = 100  # below this many rows, every interval warns
FEW_ROWS_OF_A_CLASS = 10  # below this many rows of one class, the intervals of averages over classes warn
LEFT_OUT_SINGLY = 2000  # up to this many rows, the jackknife leaves out one row at a time
JACKKNIFE_GROUPS = 500  # above it, one of this many random groups of rows
SENTENCES = "; "  # between the sentences of a warning
UNSURE = "the interval may cover less than"


@dataclass(frozen=True)
class Interval:
    """A score and its confidence interval, low <= value <= high, in the score's own unit.

    `method` is "wilson", "bca", "percentile" (where BCa is undefined) or "none" (low = high = value). `warning` says
    why the interval may not hold, where that is so.
    """

    value: float
    low: float
    high: float
    method: str
    warning: str | None = None

    def times(self, factor: float) -> Interval:
        """The same score in another unit."""
        return replace(self, value=factor * self.value, low=factor * self.low, high=factor * self.high)

    def as_dict(self) -> dict[str, Any]:
        """Returns {"value", "low", "high", "method"}, and "warning" only where there is one."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of a proportion p = successes / n (Wilson 1927): accuracy, or any other share of right rows."""
    from scipy.stats import binomtest  # a second to import

    few = _check(n, confidence)
    if not 0 <= successes <= n:
        raise ValueError(f"successes must be between 0 and n = {n}, not {successes}")
    found = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Interval(successes / n, float(found.low), float(found.high), "wilson", few)


def bootstrap(
    stats: Stats, statistic: Statistic, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Bias-corrected and accelerated (BCa) bootstrap interval of any statistic of the rows (Efron 1987).

    Ours and not `scipy.stats.bootstrap`, whose numbers it gives (tested): it takes arrays of any shape, several
    statistics of one set of resamples, memory in proportion to n instead of n², and a jackknife that stays fast.

    Args:
        stats: row statistics; every array has first dimension n, and rows are drawn jointly.
        statistic: maps row statistics, of any number of rows, to a number.
        confidence: share of samples whose interval is to cover the truth.
        resamples: number of bootstrap samples.
        seed: of the resampling; equal seeds give equal intervals.

    Returns:
        The BCa interval. The percentile interval, with a warning, where BCa is undefined: every resample gave the same
        value, or all lie on one side of it. No interval for one row, or where the value is not finite.
    """
    return _resample(_rows(stats), lambda rows: [statistic(_take(stats, rows))], confidence, resamples, seed)[0]


def paired_difference(
    stats_a: Stats, stats_b: Stats, statistic: Statistic, *, seed: int = 0, resamples: int = 2000
) -> Interval:
    """95% interval of statistic(a) - statistic(b), two models on the same rows in the same order, by paired bootstrap.

    Every resample draws the same rows for both, so what makes a row hard for both cancels out. Arguments: `bootstrap`.
    """

    def at(rows: Array) -> list[float]:
        return [statistic(_take(stats_a, rows)) - statistic(_take(stats_b, rows))]

    return _resample(_rows(stats_a, stats_b), at, 0.95, resamples, seed)[0]


def mcnemar(a_right: Array, b_right: Array) -> float:
    """Exact two-sided p-value that two models are right equally often on the same rows (McNemar 1947).

    The binomial test of the rows that only one of them gets right; 1 if there is none.
    `a_right`, `b_right`: whether each model is right on each row, [n] (bool, or 0 and 1).
    """
    from scipy.stats import binomtest

    a, b = np.asarray(a_right, dtype=bool), np.asarray(b_right, dtype=bool)
    if a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape} and b has {b.shape}: McNemar's test needs the same rows")
    only_a, only_b = int(np.count_nonzero(a & ~b)), int(np.count_nonzero(b & ~a))
    return float(binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def classification_metrics(stats: Stats) -> dict[str, float]:
    """Scores of a classifier. F1 of a class = 2 hits / (rows of it + predictions of it), 0 where there is neither.

    `stats` is {"gold", "predicted"}: class ids, int [n] (single-label), or 0/1 or bool, [n, k] (multi-label).

    - accuracy: share of rows with the right class; multi-label: with exactly the right set of labels.
    - macro_f1: mean F1 over the classes that occur in gold or predictions; multi-label: over all k labels (both as
      scikit-learn's `f1_score(average="macro")`).
    - weighted_f1 (single-label): mean F1, each class weighted by its rows.
    - micro_f1 (multi-label): F1 of all n x k decisions together.
    - mcc (single-label): Matthews' correlation for k classes (Gorodkin 2004), 0 where undefined.
    """
    gold, predicted, tallies = stats["gold"], stats["predicted"], _tallies(stats)
    if gold.ndim == 1:
        return _single_label_scores(*tallies)
    return _multi_label_scores(*tallies, exact=float((gold == predicted).all(axis=1).mean()))


def classification_intervals(stats: Stats, names: Sequence[Any]) -> dict[str, Interval]:
    """95% intervals of all `classification_metrics(stats)`: accuracy by Wilson, the others by BCa bootstrap.

    `names` are those of the k classes in the order of their ids. An interval warns where n < 100 and, for macro_f1 and
    weighted_f1, where a class that occurs in gold has fewer than 10 rows.
    """
    gold, predicted = stats["gold"], stats["predicted"]
    n, scores, tallies = len(gold), classification_metrics(stats), _tallies(stats, len(names))
    others = [name for name in scores if name != "accuracy"]
    if gold.ndim == 2:  # summing the ones, weighted by how often a row was drawn, is faster than gathering n x k tables
        ones = [np.nonzero(table) for table in (np.logical_and(gold, predicted), gold, predicted)]

    def at(rows: Array) -> list[float]:
        if gold.ndim == 1:
            found = classification_metrics(_take(stats, rows))
        else:
            drawn = np.bincount(rows, minlength=n)
            sums = [np.bincount(label, weights=drawn[row], minlength=gold.shape[1]) for row, label in ones]
            found = _multi_label_scores(sums[0], sums[1], sums[2], exact=0.0)
        return [found[name] for name in others]

    out = {"accuracy": wilson(round(scores["accuracy"] * n), n)}
    out.update(zip(others, _resample(n, at, 0.95, 2000, 0), strict=True))
    small = [str(name) for name, rows in zip(names, tallies[1], strict=True) if 0 < rows < FEW_ROWS_OF_A_CLASS]
    for name in ("macro_f1", "weighted_f1"):
        if small and name in out:
            share = f"{len(small)} of {np.count_nonzero(tallies[1])} classes"
            which = f" ({', '.join(small)})" if len(small) <= 3 else ""
            sentence = f"{share} have fewer than {FEW_ROWS_OF_A_CLASS} test rows{which}: {UNSURE} 95%"
            out[name] = replace(out[name], warning=_join(out[name].warning, sentence))
    return out


def intervals(stats: Stats, metrics: Callable[[Stats], dict[str, float]]) -> dict[str, Interval]:
    """95% BCa bootstrap intervals of several metrics of the rows, from one set of resamples."""
    names = list(metrics(stats))

    def at(rows: Array) -> list[float]:
        found = metrics(_take(stats, rows))
        return [found[name] for name in names]

    return dict(zip(names, _resample(_rows(stats), at, 0.95, 2000, 0), strict=True))


def regression_metrics(stats: Stats) -> dict[str, float]:
    """Scores of predicted numbers; `stats` is {"gold", "predicted"}, float [n, numbers]. The mean over a row's numbers.

    - mse, mae: mean squared and mean absolute error (as scikit-learn's).
    - pearson, spearman: correlation of numbers and of ranks (as SciPy's); 0 where one side does not vary.
    """
    from scipy.stats import rankdata

    gold, predicted = stats["gold"], stats["predicted"]
    if gold.shape != predicted.shape or gold.ndim != 2:
        raise ValueError(f"gold has shape {gold.shape}, predicted has {predicted.shape}: both must be [n, numbers]")
    pairs = list(zip(gold.T, predicted.T, strict=True))
    return {
        "mse": float(((predicted - gold) ** 2).mean(0).mean()),
        "mae": float(np.abs(predicted - gold).mean(0).mean()),
        "pearson": float(np.mean([_correlation(*pair) for pair in pairs])),
        "spearman": float(np.mean([_correlation(*map(rankdata, pair)) for pair in pairs])),
    }


def coverage_curve(stats: Stats) -> list[dict[str, float]]:
    """What a classifier that abstains below a threshold answers, and how much of it is right (El-Yaniv & Wiener 2010).

    `stats` is {"gold", "predicted", "score"}, [n] each. One {"threshold", "coverage", "accuracy"} for every score that
    occurs, the highest first; coverage is the share of rows with at least that score, accuracy that of right ones
    among them.
    """
    order = np.argsort(-stats["score"], kind="stable")
    scores, right = stats["score"][order], (stats["gold"] == stats["predicted"])[order]
    last = np.append(scores[1:] != scores[:-1], True)  # of equal scores all are answered or none
    answered = np.arange(1, len(scores) + 1)
    columns = (scores[last], answered[last] / len(scores), right.cumsum()[last] / answered[last])
    keys = ("threshold", "coverage", "accuracy")
    return [dict(zip(keys, row, strict=True)) for row in zip(*(x.tolist() for x in columns), strict=True)]


def _correlation(a: Array, b: Array) -> float:
    """Pearson's r, in the order of operations of `scipy.stats.pearsonr`."""
    a, b = a - a.mean(), b - b.mean()
    a_size, b_size = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not a_size or not b_size:
        return 0.0
    return float(np.clip((a / a_size) @ (b / b_size), -1.0, 1.0))


def per_class(stats: Stats, names: Sequence[Any]) -> list[dict[str, Any]]:
    """Scores of each class, in the order of `names`, which is that of the ids.

    One {"label", "precision", "recall", "f1" (0 where undefined), "support" (its rows), "predicted" (as often)} each.
    """
    hits, gold, predicted = _tallies(stats, len(names))
    columns = [hits / np.maximum(predicted, 1), hits / np.maximum(gold, 1), _f1(hits, gold, predicted), gold, predicted]
    keys = ("label", "precision", "recall", "f1", "support", "predicted")
    return [dict(zip(keys, row, strict=True)) for row in zip(names, *(x.tolist() for x in columns), strict=True)]


def confusion(stats: Stats, k: int) -> list[list[int]]:
    """Returns the counts of [gold class][predicted class], k x k (single-label)."""
    gold, predicted = stats["gold"], stats["predicted"]
    if gold.ndim != 1:
        raise ValueError("a confusion matrix needs one class a row, not several labels")
    _tallies(stats, k)  # raises where an id is not below k
    return np.bincount(gold.astype(np.int64) * k + predicted, minlength=k * k).reshape(k, k).tolist()


def mean_and_spread(values: Sequence[float]) -> dict[str, Any]:
    """Returns {"mean", "std" (ddof = 1; None for one value), "values"} of, say, one score over several seeds."""
    if not (numbers := [float(value) for value in values]):
        raise ValueError("there is no value to average")
    std = float(np.std(numbers, ddof=1)) if len(numbers) > 1 else None
    return {"mean": float(np.mean(numbers)), "std": std, "values": numbers}


def _tallies(stats: Stats, k: int | None = None) -> tuple[Array, Array, Array]:
    """Counts per class, [k] each: hits, rows of it, predictions of it. Without k, it is the largest id + 1."""
    gold, predicted = stats["gold"], stats["predicted"]
    if gold.shape != predicted.shape or gold.ndim not in (1, 2):
        raise ValueError(f"gold has shape {gold.shape}, predicted has {predicted.shape}: both must be [n] or [n, k]")
    _check(len(gold))
    if gold.ndim == 2:
        hits, rows, made = (np.count_nonzero(x, axis=0) for x in (np.logical_and(gold, predicted), gold, predicted))
    else:
        most = k or int(max(gold.max(), predicted.max())) + 1
        hits, rows, made = (np.bincount(ids, minlength=most) for ids in (gold[gold == predicted], gold, predicted))
    if k is not None and not len(rows) == len(made) == k:
        raise ValueError(f"the rows have {max(len(rows), len(made))} or more classes, but {k} are expected")
    return hits, rows, made


def _f1(hits: Array, gold: Array, predicted: Array) -> Any:
    return 2.0 * hits / np.maximum(gold + predicted, 1)


def _single_label_scores(hits: Array, gold: Array, predicted: Array) -> dict[str, float]:
    occurs = gold + predicted > 0
    f1, g, p = _f1(hits, gold, predicted)[occurs], gold[occurs].astype(float), predicted[occurs].astype(float)
    n, right = float(g.sum()), float(hits.sum())
    spread = (n * n - float(g @ g)) * (n * n - float(p @ p))
    return {
        "accuracy": right / n,
        "macro_f1": float(f1.mean()),
        "weighted_f1": float(np.average(f1, weights=g)),
        "mcc": (right * n - float(g @ p)) / spread**0.5 if spread > 0 else 0.0,
    }


def _multi_label_scores(hits: Array, gold: Array, predicted: Array, exact: float) -> dict[str, float]:
    macro, micro = _f1(hits, gold, predicted).mean(), _f1(hits.sum(), gold.sum(), predicted.sum())
    return {"accuracy": exact, "macro_f1": float(macro), "micro_f1": float(micro)}


def _resample(n: int, at: Callable[[Array], list[float]], confidence: float, draws: int, seed: int) -> list[Interval]:
    """Intervals of m statistics from one set of resamples; `at` maps row numbers [any] to the m statistics of them."""
    few, rng, every = _check(n, confidence), np.random.default_rng(seed), np.arange(n)
    values = [float(value) for value in at(every)]
    if n == 1:
        return [Interval(v, v, v, "none", "one test row: no interval") for v in values]
    drawn = np.array([at(rng.integers(0, n, size=n)) for _ in range(draws)], dtype=float)
    groups = every if n <= LEFT_OUT_SINGLY else np.array_split(rng.permutation(n), JACKKNIFE_GROUPS)
    without = np.array([at(np.delete(every, group)) for group in groups], dtype=float)
    found = [_bca(v, drawn[:, i], without[:, i], confidence) for i, v in enumerate(values)]
    return [replace(x, warning=_join(few, x.warning)) for x in found]


def _bca(value: float, drawn: Array, without: Array, confidence: float) -> Interval:
    """BCa interval of `value` from its resamples [B] and jackknife values [groups]; percentile where undefined.

    The ends are the quantiles Phi(z0 + (z0 + z) / (1 - a (z0 + z))) of the resamples, z = the normal quantiles of the
    confidence, z0 = Phi^-1(share of resamples below the value, ties by half), a = sum d³ / (6 (sum d²)^1.5) with
    d = mean jackknife value - jackknife value. Groups add up rows' d, which leaves a the same but for noise of 1e-3.
    """
    warning, finite = None, drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or len(finite) == 0:
        return Interval(value, value, value, "none", "the value or all resamples are not finite: no interval")
    if len(finite) < len(drawn):
        warning = f"{len(drawn) - len(finite)} of {len(drawn)} resamples had no finite value and are left out"
    noise, d = 1e-12 * float(np.abs(finite).max()), without.mean() - without
    ends = np.array([1 - confidence, 1 + confidence]) / 2
    with np.errstate(all="ignore"):
        z0 = ndtri((np.mean(finite < value - noise) + np.mean(finite <= value + noise)) / 2)
        a = np.sum(d**3) / (6 * np.sum(d**2) ** 1.5)
        bend = 1 - a * (z0 + ndtri(ends))
        quantiles = ndtr(z0 + (z0 + ndtri(ends)) / bend)
    if np.ptp(finite) <= noise:
        problem = "every resample gave the same value: the interval has no width and says nothing about other rows"
    elif not (np.isfinite(quantiles).all() and (bend > 0).all()):
        side = "all resamples lie on one side of the value" if np.isinf(z0) else "the jackknife is degenerate"
        problem = f"{side}, so BCa is undefined: {UNSURE} {confidence:.0%}"
    else:
        problem, ends = "", quantiles
    low, high = np.quantile(finite, ends).tolist()
    method, warning = "percentile" if problem else "bca", _join(warning, problem)
    return Interval(value, min(low, value), max(high, value), method, warning)


def _join(*sentences: str | None) -> str | None:
    return SENTENCES.join(x for x in sentences if x) or None


def _rows(*several: Stats) -> int:
    if len(lengths := {len(array) for stats in several for array in stats.values()}) != 1:
        raise ValueError(f"row statistics must have one number of rows, but have {sorted(lengths) or 'no array'}")
    return lengths.pop()


def _take(stats: Stats, rows: Array) -> Stats:
    return {name: array[rows] for name, array in stats.items()}


def _check(n: int, confidence: float = 0.95) -> str | None:
    """Raises where nothing can be scored; returns the warning of every interval of n rows, where n is small."""
    if n < 1:
        raise DataError("there is no row to score", mend="give at least one labelled row")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, not {confidence}")
    return f"only {n} test rows: {UNSURE} {confidence:.0%}" if n < FEW_ROWS else None
