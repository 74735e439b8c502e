"""Scores against scikit-learn, intervals against scipy and by coverage, tests against brute force; edge cases."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics as sk

from hybridtune.errors import DataError
from hybridtune.tasks.metrics import (
    Interval,
    bootstrap,
    classification_intervals,
    classification_metrics,
    confusion,
    mcnemar,
    mean_and_spread,
    paired_difference,
    per_class,
    wilson,
)

Array = np.ndarray[Any, Any]
Stats = dict[str, Array]


def single(rng: np.random.Generator, n: int, k: int, accuracy: float) -> Stats:
    """Row statistics of n rows over k classes of unequal frequency; some classes may not occur."""
    gold = rng.choice(k, size=n, p=rng.dirichlet(np.ones(k)))
    return {"gold": gold, "predicted": np.where(rng.random(n) < accuracy, gold, rng.integers(0, k, n))}


def multi(rng: np.random.Generator, n: int, k: int, dtype: type = bool) -> Stats:
    """Row statistics of n rows with 0 to k of k labels each."""
    gold = rng.random((n, k)) < rng.random(k) * 0.5
    return {"gold": gold.astype(dtype), "predicted": np.where(rng.random((n, k)) < 0.1, ~gold, gold).astype(dtype)}


def score(name: str) -> Callable[[Stats], float]:
    return lambda stats: classification_metrics(stats)[name]


def mean(stats: Stats) -> float:
    return float(stats["x"].mean())


# --- scores


@pytest.mark.filterwarnings("ignore:A single label was found")
@pytest.mark.parametrize("k", [2, 3, 8, 77])
def test_single_label_scores_equal_sklearn(k: int) -> None:
    rng = np.random.default_rng(k)
    for n in (1, 2, 5, 30, 400):
        stats = single(rng, n, k, accuracy=rng.random())
        gold, predicted = stats["gold"], stats["predicted"]
        found = classification_metrics(stats)
        assert list(found) == ["accuracy", "macro_f1", "weighted_f1", "mcc"]
        assert found["accuracy"] == sk.accuracy_score(gold, predicted)
        assert found["macro_f1"] == sk.f1_score(gold, predicted, average="macro", zero_division=0)
        assert found["weighted_f1"] == sk.f1_score(gold, predicted, average="weighted", zero_division=0)
        assert found["mcc"] == pytest.approx(sk.matthews_corrcoef(gold, predicted), abs=1e-12)


@pytest.mark.parametrize("dtype", [bool, int, np.int8])
def test_multi_label_scores_equal_sklearn(dtype: type) -> None:
    rng = np.random.default_rng(0)
    for n, k in product((1, 2, 50, 300), (2, 5, 28)):
        stats = multi(rng, n, k, dtype)
        gold, predicted = stats["gold"], stats["predicted"]
        found = classification_metrics(stats)
        assert list(found) == ["accuracy", "macro_f1", "micro_f1"]
        assert found["accuracy"] == sk.accuracy_score(gold, predicted)
        assert found["macro_f1"] == sk.f1_score(gold, predicted, average="macro", zero_division=0)
        assert found["micro_f1"] == sk.f1_score(gold, predicted, average="micro", zero_division=0)


def test_macro_f1_is_over_the_classes_that_occur() -> None:
    # class 1 is only predicted (F1 0), class 3 only in gold (F1 0), class 2 nowhere (left out)
    stats = {"gold": np.array([0, 0, 3]), "predicted": np.array([0, 1, 0])}
    assert classification_metrics(stats)["macro_f1"] == pytest.approx((0.5 + 0 + 0) / 3)


def test_mcc_does_not_overflow_on_many_rows() -> None:
    gold = np.arange(200_000) % 2
    assert classification_metrics({"gold": gold, "predicted": 1 - gold})["mcc"] == pytest.approx(-1)


def test_perfect_and_all_wrong() -> None:
    gold = np.array([0, 1, 2] * 5)
    right = classification_metrics({"gold": gold, "predicted": gold})
    wrong = classification_metrics({"gold": gold, "predicted": (gold + 1) % 3})
    assert set(right.values()) == {1.0}
    assert (wrong["accuracy"], wrong["macro_f1"], wrong["weighted_f1"]) == (0, 0, 0)
    assert wrong["mcc"] < 0
    empty = np.zeros((4, 3), dtype=bool)
    assert classification_metrics({"gold": empty, "predicted": empty}) == {
        "accuracy": 1.0,
        "macro_f1": 0.0,
        "micro_f1": 0.0,
    }


@pytest.mark.parametrize("kind", ["single", "multi"])
def test_per_class_equals_sklearn(kind: str) -> None:
    rng, k = np.random.default_rng(1), 9
    names = [f"label {i}" for i in range(k)]
    for n in (1, 10, 200):
        stats = single(rng, n, k, 0.6) if kind == "single" else multi(rng, n, k)
        gold, predicted = stats["gold"], stats["predicted"]
        expected = sk.precision_recall_fscore_support(gold, predicted, labels=range(k), zero_division=0)
        rows = per_class(stats, names)
        assert [row["label"] for row in rows] == names
        for key, column in zip(("precision", "recall", "f1", "support"), expected, strict=True):
            assert [row[key] for row in rows] == column.tolist(), key
        count = predicted.sum(axis=0) if kind == "multi" else np.bincount(predicted, minlength=k)
        assert [row["predicted"] for row in rows] == count.tolist()
        json.dumps(rows)


def test_confusion_equals_sklearn() -> None:
    stats = single(np.random.default_rng(2), 300, 7, 0.5)
    stats = {"gold": stats["gold"].astype(np.int8), "predicted": stats["predicted"].astype(np.int8)}
    expected = sk.confusion_matrix(stats["gold"], stats["predicted"], labels=range(20))
    table = confusion(stats, 20)
    assert table == expected.tolist()
    json.dumps(table)


def test_arrays_that_do_not_belong_together_are_refused() -> None:
    good = np.array([0, 1, 2])
    with pytest.raises(DataError, match="no row"):
        classification_metrics({"gold": good[:0], "predicted": good[:0]})
    with pytest.raises(ValueError, match="shape"):
        classification_metrics({"gold": good, "predicted": good[:2]})
    with pytest.raises(ValueError):  # a negative id
        classification_metrics({"gold": good, "predicted": good - 1})
    for use in (
        lambda s: per_class(s, ["a", "b"]),
        lambda s: classification_intervals(s, "ab"),
        lambda s: confusion(s, 2),
    ):
        with pytest.raises(ValueError, match="3 or more classes, but 2"):
            use({"gold": good, "predicted": good})
    with pytest.raises(ValueError, match="one class a row"):
        confusion(multi(np.random.default_rng(0), 5, 3), 3)


# --- Wilson


def test_wilson_is_the_formula_of_the_book() -> None:
    for n, confidence in product((1, 2, 10, 99, 3080), (0.9, 0.95, 0.99)):
        z = scipy.stats.norm.ppf((1 + confidence) / 2)
        for successes in {0, 1, n // 2, n - 1, n}:
            p, found = successes / n, wilson(successes, n, confidence)
            half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
            ends = np.array([p + z**2 / (2 * n) - half, p + z**2 / (2 * n) + half]) / (1 + z**2 / n)
            assert (found.low, found.high) == pytest.approx(tuple(ends), abs=1e-12)
            assert found.value == successes / n
            assert found.method == "wilson"
            assert 0 <= found.low <= found.value <= found.high <= 1
            assert (found.warning is not None) == (n < 100)


def wilson_coverage(p: float, n: int) -> float:
    """Exact: the probability of all counts whose interval holds p."""
    intervals = [wilson(successes, n) for successes in range(n + 1)]
    inside = np.array([interval.low <= p <= interval.high for interval in intervals])
    return float(scipy.stats.binom.pmf(np.arange(n + 1), n, p) @ inside)


def test_wilson_covers_where_the_percentile_bootstrap_does_not() -> None:
    assert wilson_coverage(0.98, 100) >= 0.93
    for p, n in product((0.5, 0.7, 0.8, 0.9, 0.95), (100, 400)):
        assert wilson_coverage(p, n) >= 0.93, (p, n)
    assert np.mean([wilson_coverage(p, 100) for p in np.linspace(0.5, 0.99, 50)]) == pytest.approx(0.95, abs=0.01)


def test_wilson_refuses_what_cannot_be() -> None:
    with pytest.raises(DataError, match="no row"):
        wilson(0, 0)
    with pytest.raises(ValueError, match="between 0 and n"):
        wilson(11, 10)
    with pytest.raises(ValueError, match="confidence"):
        wilson(5, 10, confidence=95)


# --- bootstrap


@pytest.mark.parametrize("n", [15, 150])
@pytest.mark.parametrize("name", ["mean", "skewed", "ratio"])
def test_bca_equals_scipy_on_the_same_resamples(n: int, name: str) -> None:
    rng = np.random.default_rng(n)
    stats = {"x": rng.exponential(size=n) ** 2, "y": rng.random(n) + 0.5}
    statistic: Callable[[Stats], float] = {
        "mean": mean,
        "skewed": lambda s: float(s["x"].std()),
        "ratio": lambda s: float(s["x"].sum() / s["y"].sum()),
    }[name]
    draws: list[float] = []

    def spy(rows: Stats) -> float:
        draws.append(statistic(rows))
        return draws[-1]

    found = bootstrap(stats, spy, resamples=999, confidence=0.9)
    assert len(draws) == 1 + 999 + n  # the value, the resamples, the jackknife
    expected = scipy.stats.bootstrap(
        (stats["x"], stats["y"]),
        lambda x, y: statistic({"x": x, "y": y}),
        paired=True,
        vectorized=False,
        n_resamples=0,
        confidence_level=0.9,
        method="BCa",
        bootstrap_result=type("Drawn", (), {"bootstrap_distribution": np.array(draws[1:1000])})(),
    ).confidence_interval
    assert found.method == "bca"
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_bca_agrees_with_scipys_own_resamples() -> None:
    x = np.random.default_rng(0).exponential(size=120)
    found = bootstrap({"x": x}, mean, resamples=4000)
    expected = scipy.stats.bootstrap((x,), np.mean, n_resamples=4000, rng=np.random.default_rng(1)).confidence_interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_the_grouped_jackknife_gives_the_same_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.sort(np.random.default_rng(0).exponential(size=2500) ** 2)  # sorted rows: groups must be random
    grouped = bootstrap({"x": x}, mean, resamples=500)
    monkeypatch.setattr("hybridtune.tasks.metrics.LEFT_OUT_SINGLY", 10_000)
    exact = bootstrap({"x": x}, mean, resamples=500)
    width = exact.high - exact.low
    assert (grouped.low, grouped.high) == pytest.approx((exact.low, exact.high), abs=0.03 * width)


def test_rows_are_drawn_jointly_and_any_shape_is_taken() -> None:
    x = np.random.default_rng(0).random(50)
    stats = {"x": x, "twice": 2 * x, "table": np.stack([x, 3 * x], axis=1)}

    def statistic(rows: Stats) -> float:
        assert np.array_equal(rows["twice"], 2 * rows["x"])
        assert np.array_equal(rows["table"][:, 1], 3 * rows["x"])
        return float(rows["table"].sum() / len(rows["x"]))

    assert bootstrap(stats, statistic, resamples=50).value == pytest.approx(4 * x.mean())
    with pytest.raises(ValueError, match="one number of rows"):
        bootstrap({"x": x, "y": x[:-1]}, statistic)
    with pytest.raises(ValueError, match="one number of rows"):
        bootstrap({}, statistic)


def test_equal_seeds_give_equal_intervals() -> None:
    stats = {"x": np.random.default_rng(0).random(120)}
    first, again, other = (bootstrap(stats, mean, resamples=200, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_bca_on_the_edge_falls_back_and_says_so() -> None:
    same = bootstrap({"x": np.ones(200)}, mean)
    assert (same.value, same.low, same.high, same.method) == (1, 1, 1, "percentile")
    assert "same value" in str(same.warning)
    # the number of different values: no resample reaches that of all rows
    side = bootstrap({"x": np.arange(200.0)}, lambda s: float(len(np.unique(s["x"]))))
    assert side.method == "percentile"
    assert "one side" in str(side.warning)
    assert side.low < side.value == side.high == 200
    # a median of two values: leaving out one row never changes it
    flat = bootstrap({"x": np.repeat([0.0, 1.0], [40, 60])}, lambda s: float(np.median(s["x"])))
    assert flat.method == "percentile"
    assert "jackknife" in str(flat.warning)


def test_values_that_are_not_finite() -> None:
    x = np.random.default_rng(0).random(100)
    never = bootstrap({"x": x}, lambda s: math.nan, resamples=20)
    assert never.method == "none"
    assert "not finite" in str(never.warning)
    some = bootstrap({"x": x}, lambda s: mean(s) if s["x"][0] < 0.9 else math.nan, resamples=500)
    assert "resamples had no finite value" in str(some.warning)
    assert some.low < some.value < some.high


def test_one_row_has_no_interval_and_no_row_is_refused() -> None:
    one = bootstrap({"x": np.array([0.7])}, mean)
    assert (one.value, one.low, one.high, one.method) == (0.7, 0.7, 0.7, "none")
    assert one.warning
    with pytest.raises(DataError, match="no row"):
        bootstrap({"x": np.array([])}, mean)
    assert (
        bootstrap({"x": np.array([0.0, 1.0])}, mean).warning == "only 2 test rows: the interval may cover less than 95%"
    )


def test_bca_of_macro_f1_covers_about_95_percent() -> None:
    rng, k, n, accuracy, draws = np.random.default_rng(0), 3, 120, 0.85, 100
    covered = 0
    for draw in range(draws):  # errors spread evenly over balanced classes: the true macro-F1 is the accuracy
        gold = rng.integers(0, k, n)
        predicted = np.where(rng.random(n) < accuracy, gold, (gold + rng.integers(1, k, n)) % k)
        found = bootstrap({"gold": gold, "predicted": predicted}, score("macro_f1"), resamples=200, seed=draw)
        covered += found.low <= accuracy <= found.high
    assert 0.90 <= covered / draws <= 0.99, covered


# --- all scores of a classifier


def test_classification_intervals() -> None:
    rng, k = np.random.default_rng(0), 5
    gold = np.repeat(np.arange(k), 40)
    stats = {"gold": gold, "predicted": np.where(rng.random(len(gold)) < 0.8, gold, rng.integers(0, k, len(gold)))}
    found = classification_intervals(stats, list("abcde"))
    scores = classification_metrics(stats)
    assert list(found) == list(scores)
    assert {name: interval.value for name, interval in found.items()} == pytest.approx(scores)
    assert found["accuracy"] == wilson(int((stats["gold"] == stats["predicted"]).sum()), len(gold))
    assert found["macro_f1"] == bootstrap(stats, score("macro_f1"))
    assert found["mcc"] == bootstrap(stats, score("mcc"))
    assert {interval.warning for interval in found.values()} == {None}


def test_multi_label_intervals_equal_the_plain_bootstrap() -> None:
    stats = multi(np.random.default_rng(3), 150, 4)
    found = classification_intervals(stats, list("abcd"))
    assert list(found) == ["accuracy", "macro_f1", "micro_f1"]
    for name in ("macro_f1", "micro_f1"):
        plain = bootstrap(stats, score(name))
        assert found[name].value == plain.value
        assert found[name].method == "bca"
        assert (found[name].low, found[name].high) == pytest.approx((plain.low, plain.high), abs=1e-12)


def test_small_sets_and_small_classes_warn() -> None:
    gold = np.repeat(np.arange(8), [40, 40, 40, 40, 40, 9, 5, 1])
    predicted = np.where(np.arange(len(gold)) % 7 == 0, 0, gold)
    found = classification_intervals({"gold": gold, "predicted": predicted}, list("abcdefghi"))  # "i" occurs nowhere
    sentence = "3 of 8 classes have fewer than 10 test rows (f, g, h): the interval may cover less than 95%"
    assert found["macro_f1"].warning == found["weighted_f1"].warning == sentence
    assert found["accuracy"].warning is None
    assert found["mcc"].warning is None
    small = classification_intervals({"gold": gold[:50], "predicted": predicted[:50]}, list("abcdefghi"))
    assert all("only 50 test rows" in str(interval.warning) for interval in small.values())
    many = np.arange(200) % 50
    of_many = classification_intervals({"gold": many, "predicted": (many + many % 2) % 50}, range(50))["macro_f1"]
    assert str(of_many.warning).startswith("50 of 50 classes have fewer than 10 test rows: ")


@pytest.mark.parametrize("right", [True, False])
def test_intervals_of_perfect_and_all_wrong(right: bool) -> None:
    gold = np.arange(300) % 3
    found = classification_intervals({"gold": gold, "predicted": gold if right else (gold + 1) % 3}, "abc")
    assert (found["accuracy"].high == 1) if right else (found["accuracy"].low == 0)
    assert found["accuracy"].low < found["accuracy"].high
    assert found["macro_f1"].method == "percentile"
    assert "same value" in str(found["macro_f1"].warning)
    assert found["macro_f1"].low == found["macro_f1"].high == float(right)


def test_intervals_of_one_row_and_of_an_absent_class() -> None:
    one = classification_intervals({"gold": np.array([1]), "predicted": np.array([1])}, "ab")
    assert one["accuracy"].value == 1
    assert one["macro_f1"].method == "none"
    gold = np.arange(300) % 3
    absent = classification_intervals({"gold": gold, "predicted": np.minimum(gold, 1)}, "abc")["macro_f1"]
    assert absent.value == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert absent.low < absent.value < absent.high


def test_as_dict_names_a_warning_only_where_there_is_one() -> None:
    assert Interval(0.5, 0.4, 0.6, "bca").as_dict() == {"value": 0.5, "low": 0.4, "high": 0.6, "method": "bca"}
    assert Interval(0.5, 0.4, 0.6, "bca", "few").as_dict()["warning"] == "few"
    gold = np.arange(120) % 3
    for interval in classification_intervals({"gold": gold, "predicted": np.minimum(gold, 1)}, "abc").values():
        assert json.loads(json.dumps(interval.as_dict()))["value"] == interval.value


# --- two models


def test_mcnemar_is_the_sum_over_the_tail_and_brute_force() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 10, 200, 3000):
        a, b = rng.random(n) < 0.9, rng.random(n) < 0.85
        only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
        tail = scipy.stats.binom.cdf(min(only_a, only_b), only_a + only_b, 0.5)  # P(X <= the smaller count)
        expected = min(1.0, 2 * tail)
        assert mcnemar(a, b) == mcnemar(b, a) == pytest.approx(expected, rel=1e-9)
    a, b = np.array([1, 1, 1, 1, 0, 1, 1]), np.array([0, 0, 0, 0, 1, 1, 1])  # 4 : 1 of 5 rows that differ
    flips = [sum(sides) for sides in product((0, 1), repeat=5)]
    assert mcnemar(a, b) == pytest.approx(np.mean([abs(wins - 2.5) >= 1.5 for wins in flips]))
    assert mcnemar(a, a) == 1.0
    with pytest.raises(ValueError, match="same rows"):
        mcnemar(a, b[:1])


def test_paired_difference_of_means_is_the_interval_of_the_differences() -> None:
    rng = np.random.default_rng(0)
    a = rng.random(150)
    b = a - 0.05 + 0.02 * rng.standard_normal(150)
    found, plain = paired_difference({"x": a}, {"x": b}, mean, seed=5), bootstrap({"x": a - b}, mean, seed=5)
    assert (found.value, found.low, found.high) == pytest.approx((plain.value, plain.low, plain.high))
    apart = bootstrap({"x": a}, mean)
    assert found.high - found.low < 0.2 * (apart.high - apart.low)  # what is hard for both cancels out
    back = paired_difference({"x": b}, {"x": a}, mean, seed=5)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low), abs=1e-4)


def test_paired_difference_of_a_model_with_itself_and_of_other_rows() -> None:
    stats = single(np.random.default_rng(0), 200, 4, 0.8)
    none = paired_difference(stats, stats, score("macro_f1"), resamples=100)
    assert (none.value, none.low, none.high) == (0, 0, 0)
    with pytest.raises(ValueError, match="one number of rows"):
        paired_difference(stats, {name: array[:-1] for name, array in stats.items()}, score("macro_f1"))


def test_mean_and_spread() -> None:
    assert mean_and_spread([0.5]) == {"mean": 0.5, "std": None, "values": [0.5]}
    found = mean_and_spread(list(np.array([1, 2, 4], dtype=np.float32)))
    assert found["mean"] == pytest.approx(7 / 3)
    assert found["std"] == pytest.approx(np.std([1, 2, 4], ddof=1))
    json.dumps(found)
    with pytest.raises(ValueError, match="no value"):
        mean_and_spread([])


def test_nothing_heavy_is_imported() -> None:
    heavy = "{'torch', 'transformers', 'sklearn', 'scipy.stats'}"
    code = f"import sys, hybridtune.tasks.metrics; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
