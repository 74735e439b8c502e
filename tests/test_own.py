"""Tasks and metrics of the user's own, by the paths of their files."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import texts
import torch

import hybridtune
from hybridtune import api, tasks
from hybridtune.console import Console
from hybridtune.errors import RecipeError
from hybridtune.own_metrics import OwnMetrics
from hybridtune.tasks.classification import Task

EXAMPLES = Path(__file__).parents[1] / "examples"


def tune(base: Path, folder: Path, **keys: Any) -> hybridtune.Run:
    least = {"model": str(base), "task": "classification", **texts.splits(60, 20, 20), "strategy": "head"}
    least |= {"num_train_epochs": 1, "baselines": False, "output": str(folder)}
    return api.tune(console=Console(quiet=True), **least | keys)


def test_the_examples_work(base: Path, tmp_path: Path) -> None:
    own = {"task": str(EXAMPLES / "own_task.py"), "metrics": str(EXAMPLES / "own_metrics.py")}
    run = tune(base, tmp_path / "run", **own, goal={"minimize": "mistakes"}, strategy=["head", "lora"])
    told = run.evaluation
    lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    wrong = 100 * sum(line["gold"] != line["label"] for line in lines) / len(lines)
    assert told["metrics"]["mistakes"]["value"] == pytest.approx(wrong)
    assert told["metrics"]["mistakes"]["low"] <= wrong <= told["metrics"]["mistakes"]["high"]
    assert {"worst_class", "macro_f1"} <= set(told["metrics"])
    decision = json.loads((run.folder / "decision.json").read_text())
    assert min(decision["candidates"], key=lambda one: one["validation"]["mistakes"])["validation"]["mistakes"] == next(
        one["validation"]["mistakes"] for one in decision["candidates"] if one["strategy"] == decision["chosen"]
    )
    assert hybridtune.load(run.folder).predict(["a good b"])[0]["label"] in ("ham", "spam")


def test_the_own_loss_is_what_trains() -> None:
    logits, labels = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0])
    p = logits.softmax(-1)[[0, 1], labels]
    expected = ((1 - p) ** 2 * -p.log()).mean()
    own = tasks.load(str(EXAMPLES / "own_task.py"))(["a", "b"])
    torch.testing.assert_close(own.loss({"logits": logits}, labels), expected)
    assert tasks.from_state(json.loads(json.dumps(own.state()))).state() == own.state()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such file"),
        ("x = ", "cannot be run"),
        ("y = 1", "offers no class Task"),
        ("from hybridtune.tasks import Task as Base\nclass Task(Base): pass", "its Task lacks aggregate, "),
    ],
)
def test_a_file_without_a_task_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        tasks.load(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import math", "has no public function"),
        ("def accuracy(gold, predicted): return 1", "accuracy is a metric already"),
        ("def f(g, p): return 1\nf.direction = 'up'", "f.direction"),
    ],
)
def test_a_file_without_metrics_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        OwnMetrics.load(str(path), Task())


def test_a_metric_that_fails_is_known_before_anything_is_trained(base: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def f(gold, predicted): return gold[0] + 1")
    with pytest.raises(RecipeError, match=r"mine\.py: f fails on 20 rows"):
        tune(base, tmp_path / "run", metrics=str(path))
    assert not (tmp_path / "run").exists()


def test_abstaining_is_fitted_on_validation_rows(base: Path, tmp_path: Path) -> None:
    run = tune(base, tmp_path / "run", abstain={"coverage": 0.5}, num_train_epochs=3)
    told = run.evaluation
    assert {"coverage", "answered_accuracy"} <= set(told["metrics"])
    task = run.predictor.task
    validation = texts.splits(60, 20, 20)["validation"]
    given = [one["label"] is not None for one in run.predict([row["text"] for row in validation])]
    assert sum(given) == 10
    metrics, asked = told["metrics"], 0.5
    said = next(one for one in [*told["notes"], *told["warnings"]] if one.startswith("abstain: scores from "))
    assert f"{metrics['coverage']['value']:.1%} of these rows, of which " in said
    assert f"{metrics['answered_accuracy']['value']:.1%} are right; asked for was a label for 0.5 of the rows" in said
    assert (said in told["warnings"]) == (metrics["coverage"]["value"] < asked) == said.endswith("missed here")
    again = run.evaluate(texts.splits(60, 20, 20)["test"])
    assert said in [*again["notes"], *again["warnings"]]
    assert f"{task.threshold:.3f}" in (run.folder / "report.html").read_text()  # type: ignore[attr-defined]
    assert told["abstain"]["threshold"] == task.threshold  # type: ignore[attr-defined]
    points = told["abstain"]["curve"]
    assert points[-1]["coverage"] == 1
    assert points[-1]["accuracy"] == pytest.approx(told["metrics"]["accuracy"]["value"])
    assert all(a["threshold"] > b["threshold"] for a, b in itertools.pairwise(points))


@pytest.mark.parametrize(
    ("abstain", "coverage", "right", "fine"),
    [
        ({"accuracy": 0.95}, 0.7, 0.96, True),
        ({"accuracy": 0.95}, 0.7, 0.94, False),
        ({"accuracy": 0.95}, 0.0, 1.0, False),  # of no label all are right
        ({"coverage": 0.9}, 0.91, 0.5, True),
        ({"coverage": 0.9}, 0.89, 1.0, False),
    ],
)
def test_whether_test_rows_keep_what_was_asked(
    abstain: dict[str, float], coverage: float, right: float, fine: bool
) -> None:
    metrics = {"coverage": {"value": coverage}, "answered_accuracy": {"value": right}}
    ((said, kept),) = Task(["a", "b"], abstain=abstain, threshold=0.625).kept(metrics)
    assert kept == fine == (not said.endswith("which is missed here"))
    assert "scores from 0.625 on" in said and str(next(iter(abstain.values()))) in said


def test_an_accuracy_that_no_threshold_reaches_is_said(base: Path, tmp_path: Path) -> None:
    rows = texts.splits(60, 20, 20)
    for at, row in enumerate(rows["validation"]):
        row["label"] = ("ham", "spam")[at // 2 % 2]  # nothing to learn
    run = tune(base, tmp_path / "run", **rows, abstain={"accuracy": 1.0}, learning_rate=1e-6)
    short = any("abstain: no threshold leaves 100%" in one for one in run.evaluation["warnings"])
    assert short == (run.predictor.task.reached < 1)  # type: ignore[attr-defined]


def test_folds_take_turns(base: Path, tmp_path: Path) -> None:
    rows = texts.splits(60, 20, 20)
    run = tune(
        base, tmp_path / "run", train=rows["train"], validation=None, data={"folds": 3}, strategy=["head", "lora"]
    )
    decision = json.loads((run.folder / "decision.json").read_text())
    for candidate in decision["candidates"]:
        assert [one["fold"] for one in candidate["seeds"]] == [0, 1, 2]
        mean = sum(one["validation"]["macro_f1"] for one in candidate["seeds"]) / 3
        assert candidate["validation"]["macro_f1"] == pytest.approx(mean)
    assert any("mean of 3 folds" in reason for reason in decision["reasons"])
    assert {path.name for path in (run.folder / "trials").iterdir()} == {
        f"{name}-fold-{fold}" for name in ("head", "lora") for fold in (1, 2, 3)
    }
    assert len(run.predict(["a good b"])) == 1


def test_folds_and_validation_rows_are_one_too_many(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.folds: 3, but validation rows are given"):
        tune(base, tmp_path / "run", data={"folds": 3})
