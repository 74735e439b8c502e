"""New rows are read and repaired for a tuned model as test rows are when tuning, and scored with all its metrics."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
import texts

import hybridtune
from hybridtune import api
from hybridtune.console import Console
from hybridtune.errors import DataError, RecipeError

SCORES = {"ham": "1,5", "spam": "2,75"}


def tune(base: Path, folder: Path, **keys: Any) -> hybridtune.Run:
    least = {"model": str(base), "strategy": "head", "num_train_epochs": 1, "output": str(folder)}
    return api.tune(console=Console(quiet=True), **least | keys)


def spelt(rows: list[dict[str, Any]], **words: str) -> list[dict[str, Any]]:
    return [{**row, "label": words[row["label"]]} for row in rows]


def tagged(count: int, seed: int) -> list[dict[str, Any]]:
    """Words, of which one says where a name stands."""
    pick, found = random.Random(seed), []
    for _ in range(count):
        words = pick.choices("abcdefghij", k=5)
        at = pick.randrange(4)
        words[at] = "good"
        found.append(
            {"tokens": words, "tags": ["B-PER" if n == at else "I-PER" if n == at + 1 else "O" for n in range(5)]}
        )
    return found


def asked(number: int, seed: int, **odd: Any) -> list[dict[str, Any]]:
    pick, found = random.Random(seed), []
    for _ in range(number):
        words = pick.choices("abcdefghij", k=8)
        words[3:5] = ["good", "new"]
        context = " ".join(words)
        answers = {"text": ["good new"], "answer_start": [context.index("good")], **odd}
        found.append({"question": f"bad {words[0]} {pick.random()}", "context": context, "answers": answers})
    return found


# What tune reads, in a form that needs the check; the task's keys with it
CASES: dict[str, tuple[str, dict[str, list[dict[str, Any]]], dict[str, Any]]] = {
    "decimal commas": (
        "regression",
        {name: spelt(rows, **SCORES) for name, rows in texts.splits().items()},
        {},
    ),
    "other ways of writing a label": (
        "classification",
        {
            **texts.splits(),
            "test": spelt(texts.splits()["test"], ham="HAM", spam="Spam "),
        },
        {},
    ),
    "a misspelling that train has too": (
        "classification",
        {
            **(named := {name: spelt(rows, ham="important", spam="other") for name, rows in texts.splits().items()}),
            "train": [*named["train"], {"text": "x y good x y", "label": "importent"}],
            "test": [{**named["test"][0], "label": "importent"}, *named["test"][1:]],
        },
        {},
    ),
    "several labels in one text": (
        "classification",
        {name: spelt(rows, ham="ham|short", spam="spam|short") for name, rows in texts.splits().items()},
        {"multi_label": True},
    ),
    "another way of writing a tag": (
        "tagging",
        {
            "train": tagged(40, 1),
            "validation": tagged(10, 2),
            "test": [{**row, "tags": [tag.replace("PER", "per") for tag in row["tags"]]} for row in tagged(10, 3)],
        },
        {},
    ),
    "answers by their text alone": (
        "question_answering",
        {"train": asked(20, 1), "validation": asked(8, 2), "test": asked(8, 3, answer_start=[0])},
        {},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_test_rows_score_the_same_again(base: Path, tmp_path: Path, name: str) -> None:
    task, rows, keys = CASES[name]
    run = tune(base, tmp_path / "run", task=task, baselines=False, **rows, **keys)
    told = run.evaluate(rows["test"])
    assert told["metrics"] == run.evaluation["metrics"]
    assert told["rows"] == len(rows["test"])
    assert all(finding["split"] == "test" for finding in told["findings"])


@pytest.mark.parametrize("name", ["decimal commas", "other ways of writing a label", "another way of writing a tag",
                                  "answers by their text alone"])  # fmt: skip
def test_repeated_rows_are_said_and_counted(base: Path, tmp_path: Path, name: str) -> None:
    task, rows, keys = CASES[name]
    run = tune(base, tmp_path / "run", task=task, baselines=False, **rows, **keys)
    told = run.evaluate([*rows["test"], rows["test"][1]])
    assert [one["count"] for one in told["findings"] if one["kind"] == "duplicate"] == [1]
    assert told["rows"] == len(rows["test"]) + 1
    assert set(told["columns"]) == set(rows["test"][0])


def test_evaluate_says_what_it_repaired(base: Path, tmp_path: Path) -> None:
    _, rows, _ = CASES["decimal commas"]
    run = tune(base, tmp_path / "run", task="regression", baselines=False, **rows)
    path = texts.save_csv(tmp_path / "new.csv", [*rows["test"], {"text": "", "label": "2,5"}])
    told = hybridtune.load(run.folder).evaluate(str(path))
    assert {"decimal_comma", "empty_text"} <= {finding["kind"] for finding in told["findings"]}
    assert told["rows"] == len(rows["test"]) + 1  # none is left out for a better score
    texts.save_csv(path, [*rows["test"], {"text": "a", "label": "much"}])
    with pytest.raises(DataError, match=r"new\.csv:22: the label is not a number\n +found: +much"):
        run.evaluate(str(path))
    texts.save_csv(path, [{"text": "a", "label": "[1.5, 2.5]"}])
    with pytest.raises(DataError, match=r"new\.csv:2: the label has 2 numbers, the model gives 1"):
        run.evaluate(str(path))


OWN = """
def first_letters(gold, predicted):
    return sum(g[0] == p[0] for g, p in zip(gold, predicted)) / len(gold)

def ham_found(gold, predicted):
    return sum(g == p == "ham" for g, p in zip(gold, predicted)) / predicted.count("ham")
"""


def test_own_metrics_are_of_new_rows_and_of_baselines(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN.split("def ham_found")[0])
    rows = texts.splits()
    run = tune(base, tmp_path / "run", task="classification", metrics=str(tmp_path / "mine.py"), **rows)
    told = run.evaluate(rows["test"])
    assert told["metrics"]["first_letters"] == run.evaluation["metrics"]["first_letters"]
    for baseline in run.evaluation["baselines"]:  # "ham" and "spam" begin differently: it is the accuracy
        own = baseline["metrics"]["first_letters"]["value"]
        assert own == pytest.approx(baseline["metrics"]["accuracy"]["value"])
    assert api.evaluate_run(run.folder / "model", rows["test"])["metrics"] == told["metrics"]
    (tmp_path / "mine.py").unlink()
    with pytest.raises(RecipeError, match=r"mine\.py: there is no such file"):
        run.evaluate(rows["test"])


def test_own_metrics_that_a_baseline_has_no_value_of_are_said(base: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(OWN)
    rows = texts.splits(labels=("spam", "ham", "egg"), train=49)  # one spam more: the majority class
    own = {"metrics": str(tmp_path / "mine.py"), "strategy": "full", "num_train_epochs": 8, "learning_rate": 5e-3}
    run = tune(base, tmp_path / "run", task="classification", **own, **rows)
    without = [one for one in run.evaluation["baselines"] if "ham_found" not in one["metrics"]]
    assert "majority class" in [one["name"] for one in without]
    said = [one for one in run.evaluation["warnings"] if one.startswith("baseline majority class: ")]
    assert len(said) == 1 and "ham_found" in said[0] and "ZeroDivisionError" in said[0]


def test_an_own_file_is_known_from_another_directory(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.py").write_text(OWN.split("def ham_found")[0])
    (tmp_path / "a" / "task.py").write_text("from hybridtune.tasks.classification import Task as Task\n")
    source = (Path(hybridtune.__file__).parent / "methods" / "adapter.py").read_text()
    source = source.replace("from ..", "from hybridtune.").replace("from ._", "from hybridtune.methods._")
    (tmp_path / "a" / "way.py").write_text(source)
    monkeypatch.chdir(tmp_path / "a")
    rules = {"strategy": [{"rules": [{"part": "layers[-1:]", "method": "./way.py"}]}]}
    own = {"metrics": "mine.py", "task": "./task.py", "baselines": False}
    run = tune(base, tmp_path / "run", **texts.splits(), **own, **rules)
    monkeypatch.chdir(tmp_path)
    rows = texts.splits()["test"]
    there = hybridtune.load(run.folder)
    assert there.evaluate(rows)["metrics"] == run.evaluation["metrics"]
    manifest = json.loads(next(run.folder.glob("stages/*/manifest.json")).read_text())
    assert os.path.isabs(manifest["task"]["name"])
    assert [one["method"] for one in manifest["attachments"]] == [str(tmp_path / "a" / "way.py")]
    said = io.StringIO()
    again = {"model": str(base), "strategy": "head", "num_train_epochs": 1, "output": str(tmp_path / "run")}
    resumed = {**texts.splits(), **own, **rules, **again, "metrics": "a/mine.py", "task": "a/task.py"}
    resumed["strategy"] = [{"rules": [{"part": "layers[-1:]", "method": "a/way.py"}]}]
    assert api.tune(resume=True, console=Console(stream=said), **resumed).evaluation == run.evaluation
