"""The learning curve: where the truth is known, twice the data has to bring what it says."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from scipy.optimize import curve_fit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, r2_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from hybridtune.data.doubts.curve import EXPONENTS, STRENGTH, Curve, _follow, _score, learning_curve

Rows = tuple[np.ndarray, np.ndarray]


def blobs(rows: int, classes: int, width: int, apart: float, seed: int) -> Rows:
    """Rows of Gaussian classes; the classes are those of the seed, whatever the number of rows."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, width)) * apart / np.sqrt(2 * width)
    ids = rng.integers(0, classes, rows)
    return centres[ids] + rng.normal(size=(rows, width)), ids


def part(rows: Rows, start: int, stop: int) -> Rows:
    return rows[0][start:stop], rows[1][start:stop]


def macro_f1(train: Rows, held_out: Rows) -> float:
    model = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=2000)).fit(*train)
    return float(f1_score(held_out[1], model.predict(held_out[0]), average="macro"))


@pytest.mark.parametrize(("classes", "width", "apart"), [(3, 20, 2.5), (2, 60, 2.5)])
def test_twice_the_data_bring_what_it_says(classes: int, width: int, apart: float) -> None:
    seeds, scores, gains = 12, 0, 0
    for seed in range(seeds):
        rows = blobs(1000, classes, width, apart, seed)
        train, held_out = part(rows, 0, 320), part(rows, 640, 1000)
        found = learning_curve(train, held_out, seed=seed)
        assert found.twice is not None and found.gain is not None
        later = macro_f1(part(rows, 0, 640), held_out)
        scores += found.twice[1] <= later <= found.twice[2]
        gains += found.gain[1] <= later - found.points[-1].mean <= found.gain[2]
    assert scores >= seeds - 2  # 95% intervals: three or more misses of twelve have a chance of 2%
    assert gains >= seeds - 2


def test_points_are_the_scores_of_the_parts() -> None:
    rows = blobs(1200, 3, 20, 3, 0)
    train, held_out = part(rows, 0, 800), part(rows, 800, 1200)
    found = learning_curve(train, held_out)
    assert [point.rows for point in found.points] == [100, 200, 400, 800]
    assert found.points[-1].mean == pytest.approx(macro_f1(train, held_out), abs=0.01)
    assert found.points[-1].low == found.points[-1].high
    assert all(point.low <= point.mean <= point.high for point in found.points)
    assert found.points[0].mean < found.points[-1].mean


def test_where_nothing_is_to_be_gained() -> None:
    rows = blobs(2000, 3, 10, 9, 1)
    found = learning_curve(part(rows, 0, 1500), part(rows, 1500, 2000))
    assert found.gain is not None
    assert found.gain[1] > -0.01 and found.gain[2] < 0.01
    assert found.verdict.startswith("twice the data would likely add 0.")


def test_where_much_is_to_be_gained() -> None:
    rows = blobs(5000, 20, 200, 4.5, 2)
    train, held_out = part(rows, 0, 800), part(rows, 1600, 5000)
    found = learning_curve(train, held_out)
    assert found.gain is not None
    later = macro_f1(part(rows, 0, 1600), held_out)
    assert later - found.points[-1].mean > 0.03
    assert found.gain[1] <= later - found.points[-1].mean <= found.gain[2]
    assert found.gain[1] > 0
    assert found.verdict.startswith("twice the data would likely add")


def test_when_it_cannot_tell() -> None:
    rows = blobs(200, 2, 20, 2, 3)
    for train, held_out in [
        (part(rows, 0, 35), part(rows, 60, 200)),
        (part(rows, 0, 190), part(rows, 190, 195)),
        ((rows[0], np.zeros(200, int)), rows),
    ]:
        assert learning_curve(train, held_out).twice is None
        assert learning_curve(train, held_out).verdict.startswith("cannot tell: too little data")
    wide = learning_curve(part(rows, 0, 100), part(rows, 100, 130))
    assert wide.gain is not None and wide.gain[1] <= 0 and wide.gain[2] - wide.gain[1] > 0.05
    assert wide.verdict.startswith("cannot tell what twice the data would add")


def test_a_part_has_to_have_rows_of_every_class() -> None:
    """Trained on less than a row of a class, scores rise faster than any power law: such parts must not be used."""
    rows = blobs(4000, 40, 100, 5, 10)
    train, held_out = part(rows, 0, 600), part(rows, 1600, 4000)
    found = learning_curve(train, held_out)
    assert [point.rows for point in found.points] == [150, 300, 600]
    later = macro_f1(part(rows, 0, 1200), held_out)
    assert found.gain is not None and found.gain[1] <= later - found.points[-1].mean <= found.gain[2]
    few = learning_curve(part(rows, 0, 400), held_out)
    assert few.verdict == "cannot tell: too little data (400 rows, 2400 held out, 40 classes)"


def test_values_by_the_formula_of_least_squares() -> None:
    """Of n rows and d features, least squares has the expected R² 1 - s² (1 + d / (n - d - 1)) / variance."""
    rng = np.random.default_rng(4)
    d, noise = 30, 3.0
    x = rng.normal(size=(6000, d))
    y = x @ np.full(d, 1 / np.sqrt(d) * 3) + noise * rng.normal(size=6000)
    found = learning_curve((x[:1200], y[:1200]), (x[1200:], y[1200:]), "values")
    assert found.metric == "r2" and found.twice is not None
    expected = [1 - noise**2 * (1 + d / (n - d - 1)) / (9 + noise**2) for n in (1200, 2400)]
    assert found.points[-1].mean == pytest.approx(expected[0], abs=0.02)
    assert found.twice[1] <= expected[1] <= found.twice[2]
    assert found.twice[0] == pytest.approx(expected[1], abs=0.02)


def test_several_labels() -> None:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(1500, 20))
    y = (x @ rng.normal(size=(20, 3)) + 2 * rng.normal(size=(1500, 3)) > 1).astype(int)
    y = np.hstack([y, np.zeros((1500, 1), int)])  # a label that no row has
    found = learning_curve((x[:1000], y[:1000]), (x[1000:], y[1000:]), "labels")
    models = [LogisticRegression(C=STRENGTH).fit(x[:1000], y[:1000, label]) for label in range(3)]
    predicted = np.stack([model.predict(x[1000:]) for model in models] + [np.zeros(500, int)], axis=1)
    expected = f1_score(y[1000:], predicted, average="macro", zero_division=0)
    assert found.points[-1].mean == pytest.approx(expected, abs=0.02)


def test_the_seed_decides_and_texts_may_be_classes() -> None:
    x, ids = blobs(600, 3, 10, 2, 6)
    names = np.array(["b", "a", "c"])[ids]
    first, again = (learning_curve((x[:400], names[:400]), (x[400:], names[400:]), seed=1) for _ in range(2))
    other = learning_curve((x[:400], names[:400]), (x[400:], names[400:]), seed=2)
    assert first == again != other
    assert isinstance(first, Curve)
    assert json.loads(json.dumps(first.as_dict()))["points"][0]["rows"] == 50


@pytest.mark.parametrize(("a", "b", "c"), [(0.1, 0.3, 0.5), (0.0, 0.5, 0.3), (0.2, 0.1, 1.0), (0.4, 0.0, 0.5)])
def test_a_power_law_is_followed_exactly(a: float, b: float, c: float) -> None:
    assert c in EXPONENTS.round(10)
    rows = np.array([125.0, 250, 500, 1000])
    errors = a + b * (rows / 100) ** -c
    assert _follow(rows, errors[None], 2000)[0] == pytest.approx(a + b * 20**-c, abs=1e-9)


def test_a_noisy_curve_is_followed_as_by_scipy() -> None:
    rng = np.random.default_rng(7)
    rows = np.array([125.0, 250, 500, 1000])

    def law(n: np.ndarray, a: float, b: float, c: float) -> np.ndarray:
        return a + b * (n / 1000) ** -c

    for _ in range(20):
        errors = law(rows, 0.15, 0.2, 0.5) + 0.002 * rng.normal(size=4)
        best = curve_fit(law, rows, errors, p0=(0.15, 0.2, 0.5), bounds=((0, 0, 0.1), (1, 5, 1)), max_nfev=10_000)[0]
        assert _follow(rows, errors[None], 2000)[0] == pytest.approx(law(np.array(2000.0), *best), abs=1e-3)


def test_scores_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(8)
    for _ in range(5):
        gold, predicted = rng.integers(0, 6, 40), rng.integers(0, 7, 40)
        assert _score(gold, predicted, "classes") == pytest.approx(f1_score(gold, predicted, average="macro"))
        sets, others = rng.integers(0, 2, (2, 40, 5))
        assert _score(sets, others, "labels") == pytest.approx(f1_score(sets, others, average="macro"))
        values = rng.normal(size=(2, 40))
        assert _score(*values, "values") == pytest.approx(r2_score(*values))


def test_many_rows_in_little_time() -> None:
    x, ids = blobs(6000, 40, 384, 7, 9)
    started = time.perf_counter()
    learning_curve((x[:5000], ids[:5000]), (x[5000:], ids[5000:]))
    assert time.perf_counter() - started < 60
