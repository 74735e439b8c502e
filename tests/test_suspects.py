"""Suspect labels: faults that were planted have to be found, and sound labels left alone."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hybridtune.data.doubts.suspects import FOLDS, STRENGTH, suspect_label_sets, suspect_labels, suspect_values


def blobs(rows: int, classes: int, width: int, apart: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian classes in random directions."""
    rng = np.random.default_rng(seed)
    ids = np.arange(rows) % classes
    centres = rng.normal(size=(classes, width)) * apart / np.sqrt(2 * width)
    return centres[ids] + rng.normal(size=(rows, width)), ids


@pytest.mark.parametrize("seed", range(3))
def test_planted_faults_are_found_with_what_they_were(seed: int) -> None:
    x, truth = blobs(1000, 4, 20, 8, seed)
    rng = np.random.default_rng(seed)
    bad = rng.choice(1000, 50, replace=False)
    given = truth.copy()
    given[bad] = (truth[bad] + rng.integers(1, 4, 50)) % 4
    names = np.array(["red", "green", "blue", "grey"])
    found = suspect_labels(x, names[given], seed=seed)
    rows = [one.row for one in found]
    assert len(set(rows) & set(bad)) >= 30  # confident learning counts with care: see the next test
    assert len(set(rows) - set(bad)) <= 1
    for one in found:
        assert one.given == names[given[one.row]] != one.suggested
        assert one.suggested == names[truth[one.row]] or one.row not in bad
    assert [one.score for one in found] == sorted(one.score for one in found)
    assert all(0 <= one.score < 0.5 for one in found)


def test_as_many_as_the_published_formula_counts() -> None:
    """A row counts where a class reaches the mean of the rows given that class, and the likeliest such is another."""
    x, ids = blobs(900, 5, 30, 3.5, 5)
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=7)
    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, tol=1e-3))
    p = cross_val_predict(model, x.astype(np.float32), ids, cv=folds, method="predict_proba")
    enough = np.array([p[ids == label, label].mean() for label in range(5)])
    likeliest = np.where(p >= enough, p, -1).argmax(1)
    wrong = (p >= enough).any(1) & (likeliest != ids)
    own = p[np.arange(900), ids]
    expected = np.argsort(own)[: wrong.sum()]
    found = suspect_labels(x, ids, seed=7)
    assert 10 < len(found) < 200
    assert [one.row for one in found] == expected[p[expected].argmax(1) != ids[expected]].tolist()
    assert [one.score for one in found] == pytest.approx(own[[one.row for one in found]], abs=1e-5)


def test_sound_labels_are_left_alone() -> None:
    x, ids = blobs(600, 3, 20, 12, 0)
    assert suspect_labels(x, ids) == []


def test_the_seed_decides_and_features_need_not_be_scaled() -> None:
    x, ids = blobs(400, 3, 10, 3, 1)
    assert suspect_labels(x, ids, seed=3) == suspect_labels(x, ids, seed=3)
    scale = np.exp2(np.arange(10))  # powers of two: the standardised features stay the same numbers
    scaled = suspect_labels(x * scale, ids, seed=3)
    assert [one.row for one in scaled] == [one.row for one in suspect_labels(x, ids, seed=3)]


def test_few_rows_of_a_class_are_not_judged() -> None:
    x, ids = blobs(300, 3, 10, 8, 2)
    ids[:2], ids[2] = 7, 9  # two classes that folds cannot be made of
    ids[3 : 3 + FOLDS] = 8  # as many wrong rows as there are folds
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = suspect_labels(x, ids)
    assert not {0, 1, 2} & {one.row for one in found}
    assert not {7, 9} & {one.suggested for one in found}


@pytest.mark.parametrize("labels", [[], ["a"] * 30, list("ab") * 3, [f"l{n}" for n in range(30)]])
def test_nothing_to_judge(labels: list[str]) -> None:
    assert suspect_labels(np.zeros((len(labels), 4)), labels) == []


def test_label_sets() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(800, 12))
    truth = (x[:, :4] > np.array([0, 0.5, -0.5, 1.5])).astype(int)
    clear = np.flatnonzero((np.abs(x[:, :4] - np.array([0, 0.5, -0.5, 1.5])) > 0.8).all(1))
    given, bad = truth.copy(), {}
    for row in rng.choice(clear, 20, replace=False).tolist():
        bad[row] = int(rng.integers(0, 3))
        given[row, bad[row]] ^= 1
    given = np.hstack([given, np.zeros((800, 1), int), np.ones((800, 1), int)])  # labels of no row and of all
    found = {one.row: one for one in suspect_label_sets(x, given)}
    assert len(set(found) & set(bad)) >= 18
    for row in set(found) & set(bad):
        one = found[row]
        assert one.given == tuple(np.flatnonzero(given[row]))
        assert bad[row] in set(one.given) ^ set(one.suggested)
    scores = [one.score for one in suspect_label_sets(x, given)]
    assert scores == sorted(scores)


def test_values_by_a_normal_truth() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(1000, 8))
    y = x @ rng.normal(size=8) + rng.normal(size=1000)
    bad = rng.choice(1000, 20, replace=False)
    y[bad] += rng.choice([-8, 8], 20)
    found = suspect_values(x, y)
    rows = [one.row for one in found]
    assert set(bad) <= set(rows)
    assert len(rows) <= 20 + 3  # of normal residuals, one in 2,000 is beyond 3.5
    assert set(rows[:20]) == set(bad)
    assert all(abs(one.suggested - one.given) > 3 for one in found)


def test_values_without_noise_or_rows() -> None:
    x = np.random.default_rng(2).normal(size=(50, 3))
    assert suspect_values(x, np.ones(50)) == []
    assert suspect_values(x[:5], np.arange(5)) == []


def test_many_classes_in_little_time() -> None:
    x, ids = blobs(10_000, 77, 384, 7, 4)
    started = time.perf_counter()
    suspect_labels(x.astype(np.float32), ids)
    assert time.perf_counter() - started < 60
