"""Regression: scores against scikit-learn and SciPy, units, whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from scipy import stats as scipy_stats
from sklearn import metrics as sklearn_metrics

import hybridtune
from hybridtune import api, tasks
from hybridtune.console import Console
from hybridtune.errors import DataError
from hybridtune.tasks.metrics import regression_metrics
from hybridtune.tasks.regression import Task


@pytest.mark.parametrize("width", [1, 3])
def test_scores_are_the_references(width: int) -> None:
    chance = np.random.default_rng(width)
    gold = chance.normal(50, 9, (200, width)).round(0)  # with ties
    predicted = gold + chance.normal(0, 5, gold.shape)
    found = regression_metrics({"gold": gold, "predicted": predicted})
    assert found["mse"] == pytest.approx(sklearn_metrics.mean_squared_error(gold, predicted), rel=1e-15)
    assert found["mae"] == pytest.approx(sklearn_metrics.mean_absolute_error(gold, predicted), rel=1e-15)
    pairs = list(zip(gold.T, predicted.T, strict=True))
    assert found["pearson"] == pytest.approx(
        np.mean([scipy_stats.pearsonr(*pair).statistic for pair in pairs]), rel=1e-15
    )
    assert found["spearman"] == pytest.approx(
        np.mean([scipy_stats.spearmanr(*pair).statistic for pair in pairs]), rel=1e-14
    )


def test_what_does_not_vary_correlates_with_nothing() -> None:
    flat = {"gold": np.arange(5.0)[:, None], "predicted": np.full((5, 1), 2.0)}
    assert regression_metrics(flat)["pearson"] == regression_metrics(flat)["spearman"] == 0


def test_the_loss_is_the_models_own() -> None:
    model = tiny.classifier("bert", num_labels=3, problem_type="regression")
    labels = torch.randn(2, 3)
    with torch.no_grad():
        own = model(**tiny.batch(), labels=labels)
        ours = Task([0.0] * 3, [1.0] * 3).loss(model(**tiny.batch()), labels)
    torch.testing.assert_close(ours, own.loss)


def test_targets_go_to_the_model_in_units_of_their_spread_and_come_back() -> None:
    rows = Dataset.from_list(
        [{"text": "a", "label": value, "_row": n} for n, value in enumerate([100.0, 300.0, 500.0])]
    )
    task = Task([300.0], [200.0])
    items = task.encode(rows, tiny.tokenizer(), 16)
    assert items["labels"][:] == [[-1.0], [0.0], [1.0]]
    said = task.decode(np.array(items["labels"][:]), items, rows)
    assert [one["value"] for one in said] == [100.0, 300.0, 500.0]
    assert task.aggregate(task.row_stats(np.array(items["labels"][:]), items, rows))["mse"] == 0


def priced(count: int, seed: int, scale: float = 1.0) -> list[dict[str, Any]]:
    """The number of "good" less that of "bad"."""
    chance = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words = [str(word) for word in chance.choice([*"abcdef", "good", "bad"], chance.integers(3, 12))]
        rows.append({"text": " ".join(words), "label": scale * float(words.count("good") - words.count("bad"))})
    return rows


def tune(base: Path, folder: Path, scale: float = 1.0, **keys: Any) -> hybridtune.Run:
    given = {"train": priced(160, 0, scale), "test": priced(60, 1, scale), "strategy": "full", "num_train_epochs": 6}
    given |= {"per_device_train_batch_size": 8, "learning_rate": 3e-3}
    return api.tune(model=str(base), task="regression", output=str(folder), console=Console(quiet=True), **given | keys)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> hybridtune.Run:
    return tune(base, tmp_path_factory.mktemp("regression") / "run")


def test_a_whole_run_learns(run: hybridtune.Run) -> None:
    told = run.evaluation
    assert told["goal"] == {"metric": "mse", "direction": "minimize"}
    assert told["metrics"]["pearson"]["value"] > 0.8
    assert {one["name"] for one in told["baselines"]} == {"mean", "bag of words", "frozen features"}
    lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    gold, predicted = ([line[key] for line in lines] for key in ("gold", "value"))
    assert told["metrics"]["mse"]["value"] == pytest.approx(np.mean(np.subtract(gold, predicted) ** 2), rel=1e-4)
    assert "Targets" in (run.folder / "report.html").read_text()
    assert "its logit times" in (run.folder / "model" / "README.md").read_text()


def test_the_unit_of_the_targets_does_not_matter(run: hybridtune.Run, base: Path, tmp_path: Path) -> None:
    large = tune(base, tmp_path / "run", scale=1000.0, baselines=False)
    small = run.evaluation["metrics"]["mse"]["value"]
    assert large.evaluation["metrics"]["mse"]["value"] == pytest.approx(1e6 * small, rel=1e-3)


def test_predictions_come_in_the_rows_order_and_survive_reloading(run: hybridtune.Run) -> None:
    texts = [row["text"] for row in priced(30, 9)]
    said = run.predict(texts)
    assert [one["value"] for one in said] == pytest.approx(
        [run.predict([text])[0]["value"] for text in texts], abs=1e-4
    )
    again = hybridtune.load(run.folder / "model").predict(texts)
    assert [one["value"] for one in again] == pytest.approx([one["value"] for one in said], abs=1e-5)


def test_several_numbers_a_row(base: Path, tmp_path: Path) -> None:
    def two(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, "label": [row["label"], 10 - row["label"]]} for row in rows]

    found = tune(base, tmp_path / "run", train=two(priced(60, 0)), test=two(priced(20, 1)), num_train_epochs=1)
    assert np.shape([one["value"] for one in found.predict(["a good b", "bad"])]) == (2, 2)
    assert set(found.evaluation["metrics"]) == {"mse", "mae", "pearson", "spearman"}
    lines = [json.loads(line) for line in (found.folder / "predictions.jsonl").read_text().splitlines()]
    gold, value = (np.array([line[key] for line in lines]) for key in ("gold", "value"))
    assert [one["number"] for one in found.evaluation["per_number"]] == [1, 2]
    for at, one in enumerate(found.evaluation["per_number"]):
        assert one["mae"] == pytest.approx(np.abs(gold - value)[:, at].mean(), rel=1e-4)
        assert one["pearson"] == pytest.approx(np.corrcoef(gold[:, at], value[:, at])[0, 1], abs=1e-4)
    assert found.evaluate(two(priced(20, 1)))["per_number"] == found.evaluation["per_number"]
    assert "By number" in (found.folder / "report.html").read_text()


def test_labels_that_are_no_numbers_are_refused(base: Path, tmp_path: Path) -> None:
    rows = [{**row, "label": "ham"} for row in priced(30, 0)]
    with pytest.raises(DataError, match="number"):
        tune(base, tmp_path / "run", train=rows)


def test_the_task_comes_back_from_its_state() -> None:
    task = Task([3.0, 1.0], [2.0, 9.0], several=True, pairs=True)
    assert tasks.from_state(json.loads(json.dumps(task.state()))).state() == task.state()
